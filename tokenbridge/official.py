"""Published checkpoints: official tensors by their official names, into our modules and back.

- TokenBridge (YuqingWang1029/TokenBridge at 3ede281, models/tokenbridge.py): flat names, which are ours without
  `backbone.` or `head.`; and three buffers that follow from the sizes, which we compute and only verify.
- KL-16 (the same repository, models/vae.py; LDM's names) into diffusers' AutoencoderKL.

Loading is strict: every tensor is used once, every parameter is filled, shapes agree. Nothing pickled is run.
"""

from __future__ import annotations

import argparse
import pickle  # for its exception alone
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tokenbridge.generator import TokenBridge
from tokenbridge.presets import PRESETS, Model, create_model
from tokenbridge.quantizer import gaussian_bin_edges

KL16 = "kl16"
KL16_SCALE = 0.2325  # latents are multiplied by it before quantisation (engine_tokenbridge.py)
BUFFERS = ("channel_mask", "reconstruction_values", "boundaries")  # of the official TokenBridge
BUFFER_TOLERANCE = 1e-4  # buffers carry float32 rounding of erf and exp, about 1e-5 at 64 levels; spacing is 1e-2
NUM_LISTED = 5  # names of each kind in an error message

State = dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Where an official tensor goes."""

    name: str  # in our module
    shape: tuple[int, ...]  # official; ours may drop trailing ones (1 × 1 convolutions that are linear layers here)
    kernel: bool = False  # laid out as in Flax: [in, out] however split further, or [height, width, in, out]
    part: tuple[int, int] | None = None  # (i, n): it is the i-th of n equal parts of ours, along the first dimension

    def to_official(self, ours: Tensor) -> Tensor:
        """Return the official tensor, from the whole of ours."""
        if self.part is not None:
            ours = ours.chunk(self.part[1])[self.part[0]]
        if self.kernel:
            ours = ours.permute(2, 3, 1, 0) if ours.ndim == 4 else ours.T
        return ours.reshape(self.shape)

    def from_official(self, official: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return our tensor of this shape, or the part of it that this is; the inverse of `to_official`."""
        if self.part is not None:
            shape = (shape[0] // self.part[1], *shape[1:])
        if not self.kernel:
            return official.reshape(shape)
        if len(shape) == 4:
            return official.permute(3, 2, 0, 1).contiguous()
        return official.reshape(shape[::-1]).T.contiguous()


def layout(module: nn.Module) -> dict[str, Place]:
    """Return the place of every official parameter in `module`, by official name and in official shape.

    Args:
        module: a `TokenBridge`, its backbone or its head alone, diffusers' AutoencoderKL, or a model with a method
            `official_layout` of its own; on any device, the meta device included.
    """
    if isinstance(module, AutoencoderKL):
        return _kl16_layout(module)
    if (own := getattr(module, "official_layout", None)) is not None:  # the baselines know their names themselves
        return cast("dict[str, Place]", own())
    prefix = isinstance(module, TokenBridge)  # "backbone." or "head."; the parts alone have the official names
    names = {name.split(".", 1)[1] if prefix else name: name for name, _ in module.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert len(names) == len(shapes), "two parameters share an official name"
    return {official: Place(ours, shapes[ours]) for official, ours in names.items()}


def official_buffers(model: TokenBridge) -> State:
    """Return the official model's three buffers, computed from our configuration.

    `channel_mask` [C, C] is causal: -inf above the diagonal. `reconstruction_values` [V] and `boundaries` [V + 1]
    are the quantiser's levels and bin edges in units of its Gaussian; the official code never uses the edges.
    """
    config: Any = model.config
    size = model.num_channels
    unit = float(config.num_sigmas) / float(config.value_range)
    return {
        "channel_mask": torch.full((size, size), float("-inf"), device="cpu").triu(1),
        "reconstruction_values": model.quantizer.codebook.cpu() * unit,
        "boundaries": gaussian_bin_edges(config.num_levels, num_sigmas=config.num_sigmas),
    }


def to_official(module: nn.Module) -> State:
    """Return the official state dict of `module`: all parameters, and the buffers of a TokenBridge.

    What the official class loads with `strict=True`; tensors share memory with the module's where layouts agree.
    The inverse of `from_official`. The channel order is a constant of the official code and no part of its state:
    only models of that order mean the same there.
    """
    ours = dict(module.named_parameters())
    state = {name: place.to_official(ours[place.name].detach()) for name, place in layout(module).items()}
    return state | official_buffers(module) if isinstance(module, TokenBridge) else state


def from_official(module: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Return `state`, an official state dict, under our names and in our shapes, ready for `load_state_dict`.

    Buffers of a TokenBridge may be there or not; one that is there must agree with ours. Tensors are views
    where layouts agree.

    Raises:
        ValueError: tensors missing, left over, of another shape or type, or buffers of another model; the message
            lists the first of each kind and counts the rest.
    """
    places = layout(module)
    buffers = official_buffers(module) if isinstance(module, TokenBridge) else {}
    problems = [
        *_listed("missing", [name for name in places if name not in state]),
        *_listed("left over", [name for name in state if name not in places and name not in buffers]),
        *_listed("of another shape", _wrong_shapes(places, state)),
        *_listed("not floating point", _wrong_types(places, state)),
        *_listed("of another model", _wrong_buffers(buffers, state)),
    ]
    if problems:
        raise ValueError(f"This is not the state of {_describe(module)}: {'; '.join(problems)}.{_hint(state)}")
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    parts: dict[str, list[Tensor]] = {}
    for name, place in places.items():
        parts.setdefault(place.name, []).append(place.from_official(state[name], shapes[place.name]))
    return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in parts.items()}


def load_official(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put an official state dict into `module`, which may be on the meta device, without copying a tensor.

    Raises:
        ValueError: as `from_official`.
    """
    parameters = from_official(module, state)
    # Our buffers (the codebook) are not in the checkpoint: they stay as the constructor made them.
    module.load_state_dict({**dict(module.named_buffers()), **parameters}, assign=True)


def load_checkpoint(path: Path | str, *, ema: bool = True) -> State:
    """Read the weights of an official checkpoint file, by their official names, onto the CPU.

    Only these weights are read into memory: the file is mapped, so that the optimizer's state costs nothing.

    Args:
        path: `checkpoint-last.pth` (model, model_ema, optimizer, epoch, scaler, args) or `kl16.ckpt` (model).
        ema: the moving average of the weights, which the published evaluations used; False takes `model`, the
            only one that `kl16.ckpt` has.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is truncated or no checkpoint, that holds pickled code (never run), or that lacks
            the weights asked for.
    """
    path = Path(path)
    content = _unpickle(path)
    key = "model_ema" if ema else "model"
    state = content.get(key) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        kind = f"keys {list(content)[:8]}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"{path} holds no weights under {key!r}; it has {kind}.")
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path}: {strange[0]!r} under {key!r} is no tensor.")
    return {name: value.detach().clone() for name, value in state.items()}  # clones outlive the mapped file


def load_tokenbridge(path: Path | str, name: str, *, ema: bool = True) -> TokenBridge:
    """Load a published TokenBridge checkpoint, in evaluation mode.

    Args:
        path: `checkpoint-last.pth`, or the folder that holds it.
        name: of the preset.
        ema: see `load_checkpoint`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `load_checkpoint` and `from_official`; the message begins with the path.
    """
    return load_published(path, create_model(name), ema=ema)


def load_published(path: Path | str, model: Model, *, ema: bool = True) -> Model:
    """Put a published checkpoint into `model`, which may be on the meta device, and return it.

    Args:
        path: `checkpoint-last.pth`, or the folder that holds it.
        model: a TokenBridge, or a model with a method `official_layout`.
        ema: see `load_checkpoint`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `load_checkpoint` and `from_official`; the message begins with the path.
    """
    path = Path(path) / "checkpoint-last.pth" if Path(path).is_dir() else Path(path)
    _load_from(path, model, ema=ema)
    return model


def load_kl16(path: Path | str) -> AutoencoderKL:
    """Load the published VAE (`kl16.ckpt`) into diffusers' AutoencoderKL, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `load_checkpoint` and `from_official`.
    """
    vae = create_kl16()
    _load_from(Path(path), vae, ema=False)
    return vae


def check_replaceable(folder: Path | str, index: str) -> None:
    """Raise ValueError unless `folder` is absent, empty, or has the file `index`, as what would replace it has."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / index).is_file())):
        raise ValueError(f"{folder} is there and has no {index}; it is left as it is.")


def create_kl16(
    *,
    embed_dim: int = 16,
    ch: int = 128,
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
    num_res_blocks: int = 2,
    attn_resolutions: tuple[int, ...] = (16,),
    resolution: int = 256,
) -> AutoencoderKL:
    """Build KL-16, or another size of LDM's VAE, as diffusers' AutoencoderKL on the meta device.

    Arguments are the official Encoder's (models/vae.py). Which of the encoder's levels have attention follows
    from the nominal `resolution`, not from an image's size; the decoder has it in the middle only.
    """
    levels = range(len(ch_mult))
    down = [resolution // 2**i in attn_resolutions for i in levels]
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=tuple("AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in down),
            up_block_types=("UpDecoderBlock2D",) * len(ch_mult),
            block_out_channels=tuple(ch * multiplier for multiplier in ch_mult),
            layers_per_block=num_res_blocks,
            latent_channels=embed_dim,
            norm_num_groups=32,
            sample_size=resolution,
            scaling_factor=KL16_SCALE,
        ).eval()


_KL16_WORDS = (  # diffusers' and LDM's, applied in this order
    ("down_blocks.", "down."),
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    (".resnets.", ".block."),
    (".attentions.", ".attn."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".conv_norm_out.", ".norm_out."),
    (".group_norm.", ".norm."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".proj_out."),
)


def _kl16_layout(vae: AutoencoderKL) -> dict[str, Place]:
    places: dict[str, Place] = {}
    last = len(vae.config.block_out_channels) - 1
    for name, parameter in vae.named_parameters():
        # LDM counts the decoder's levels from the finest, diffusers in the order they run.
        official = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)
        for ours, theirs in _KL16_WORDS:
            official = official.replace(ours, theirs)
        # LDM's attention projections are 1 × 1 convolutions.
        ones = (1, 1) if re.search(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", official) else ()
        assert official not in places, "two parameters share an official name"
        places[official] = Place(name, (*parameter.shape, *ones))
    return places


def _unpickle(path: Path) -> Any:
    """Read a file of torch.save: tensors and plain values only.

    argparse.Namespace is let through, since the official checkpoints hold their arguments as one: restoring it
    sets attributes and runs nothing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    size = f"{path.stat().st_size:,} bytes"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except Exception as error:  # torch, zipfile and pickle have many ways to say that bytes are damaged
        if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise ValueError(f"{path} holds pickled code, which is never run ({found[1]}).") from error
        raise ValueError(f"{path} ({size}) is truncated, damaged or no checkpoint of torch.") from error


def _load_from(path: Path, module: nn.Module, *, ema: bool) -> None:
    state = load_checkpoint(path, ema=ema)
    try:
        load_official(module, state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _listed(kind: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    rest = f" and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else ""
    return [f"{len(names)} {kind}: {', '.join(names[:NUM_LISTED])}{rest}"]


def _wrong_shapes(places: Mapping[str, Place], state: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} {list(state[name].shape)} instead of {list(place.shape)}"
        for name, place in places.items()
        if name in state and tuple(state[name].shape) != place.shape
    ]


def _wrong_types(places: Mapping[str, Place], state: Mapping[str, Tensor]) -> list[str]:
    return [f"{n} {state[n].dtype}" for n in places if n in state and not state[n].is_floating_point()]


def _wrong_buffers(buffers: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    return [
        name
        for name, ours in buffers.items()
        if name in state
        and not (state[name].shape == ours.shape and torch.allclose(state[name].float(), ours, atol=BUFFER_TOLERANCE))
    ]


def _describe(module: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    kind = "KL-16" if isinstance(module, AutoencoderKL) else type(module).__name__
    name = next((p.name for p in PRESETS.values() if p.num_parameters == count), kind)
    return f"{name} ({count:,} parameters)"


def _hint(state: Mapping[str, Tensor]) -> str:
    """Name the published model whose sizes `state` has, if there is one."""
    shapes = {name: tuple(value.shape) for name, value in state.items() if name not in BUFFERS}
    for name in [*(preset.name for preset in PRESETS.values() if preset.official_name), KL16]:
        module = create_kl16() if name == KL16 else create_model(name)
        if shapes == {official: place.shape for official, place in layout(module).items()}:
            return f" It is the state of {name}."
    return ""
