"""The systems by name: what is particular to each, and their presets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from diffusers import AutoencoderKL

from tokenbridge.models.givt import checkpoint as givt_official
from tokenbridge.models.givt import cost as givt_cost
from tokenbridge.models.givt import presets as givt_presets
from tokenbridge.models.givt.checkpoint import givt_layout
from tokenbridge.models.givt.model import GIVT
from tokenbridge.models.llamagen import checkpoint as llamagen_checkpoint
from tokenbridge.models.llamagen import cost as llamagen_cost
from tokenbridge.models.llamagen import presets as llamagen_presets
from tokenbridge.models.llamagen.checkpoint import llamagen_layout
from tokenbridge.models.llamagen.model import LlamaGen
from tokenbridge.models.mar import checkpoint as mar_checkpoint
from tokenbridge.models.mar import cost as mar_cost
from tokenbridge.models.mar import presets as mar_presets
from tokenbridge.models.mar.checkpoint import mar_layout
from tokenbridge.models.mar.model import MAR
from tokenbridge.models.tokenbridge import checkpoint as tokenbridge_checkpoint
from tokenbridge.models.tokenbridge import cost as tokenbridge_cost
from tokenbridge.models.tokenbridge import presets
from tokenbridge.models.tokenbridge.checkpoint import tokenbridge_layout
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.tokenizers import givt_vae_checkpoint
from tokenbridge.tokenizers.givt_vae import GivtVAE
from tokenbridge.tokenizers.givt_vae_checkpoint import givt_vae_layout
from tokenbridge.tokenizers.kl16 import create_kl16, kl16_layout, load_kl16
from tokenbridge.tokenizers.llamagen_vq import LlamaGenVQ, create_vq, load_vq, vq_layout
from tokenbridge.utils.devices import Dtype
from tokenbridge.utils.errors import UserError
from tokenbridge.weights.artifacts import ARTIFACTS, KL16_VAE
from tokenbridge.weights.official import Layout, WrongStateError
from tokenbridge.weights.published import Preset, build_preset

SHIPPED_PRESETS = {"tokenbridge-tiny": "tiny/tokenbridge-64"}  # whose weights come with the package


@dataclass(frozen=True)
class PublishedTokenizer:
    """A published autoencoder, which makes images of a model's latents or tokens."""

    key: str  # of its file, in artifacts.py; its name for `convert`
    part: str  # what it is, for messages
    model_class: Any
    create: Callable[[], Any]  # on the meta device
    load: Callable[[Path], Any]
    layout: Callable[[Any], Layout]  # official names of a module of the class

    def load_published(self, path: Path) -> Any:
        """Load the published file; errors as `load`, and the message says whose state it is if that is known."""
        with recognised_states():
            return self.load(path)


@dataclass(frozen=True)
class Kind:
    """What is particular to a system."""

    name: str  # as in recipes.py
    model_class: Any
    presets: Mapping[str, Preset]
    layout: Callable[[Any], Layout]  # official names
    load: Callable[..., Any]  # from the published file and the preset's name
    has_average: bool  # the file holds the weights' moving average beside the last ones: `load` takes ema=
    flop: Callable[[Any, Any], dict[str, float]]  # of one image by part, from model (on the meta device) and settings
    tokenizer: PublishedTokenizer
    recipe: Literal["vae", "vq"]  # its tokenizer at the other scales
    dtype: Dtype  # of the published evaluation
    labels: Literal["random"] | None  # of the published evaluation; None: balanced
    has_global_streams: bool  # whether torch can draw as the official code does
    stand_in: Mapping[str, Any]  # settings that make a stand-in quick; the official ones otherwise
    default_size: str  # of the sessions reproduce_*
    published: str  # where the published numbers are
    notes: tuple[str, ...]  # what to know of the published numbers before comparing

    def load_published(self, path: Path, name: str, *, ema: bool = True) -> Any:
        """Load the published file of a preset.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged or of another model; other weights than the only ones are asked for.
        """
        if not (ema or self.has_average):
            raise UserError(f"The files of {self.name} hold one set of weights, no moving average beside it.")
        with recognised_states():
            return self.load(path, name, ema=ema) if self.has_average else self.load(path, name)


KL16 = PublishedTokenizer(KL16_VAE, "VAE", AutoencoderKL, create_kl16, load_kl16, kl16_layout)
VQ16, VQ8 = (
    PublishedTokenizer(
        name, "VQ tokenizer", LlamaGenVQ, partial(create_vq, name), partial(load_vq, name=name), vq_layout
    )
    for name in ("llamagen-vq16", "llamagen-vq8")
)
GIVT_VAE = PublishedTokenizer(
    "givt-vae", "VAE", GivtVAE, givt_vae_checkpoint.create_givt_vae, givt_vae_checkpoint.load_givt_vae, givt_vae_layout
)
TOKENIZERS = {tokenizer.key: tokenizer for tokenizer in (KL16, VQ16, VQ8, GIVT_VAE)}

_PRECISION_RECALL = "Precision and recall as published: TokenBridge's table 3 (arXiv 2503.16430 v1)."

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="tokenbridge",
            model_class=TokenBridge,
            layout=tokenbridge_layout,
            presets=presets.PRESETS,
            load=tokenbridge_checkpoint.load_tokenbridge,
            has_average=True,
            flop=tokenbridge_cost.count_flop,
            tokenizer=KL16,
            recipe="vae",
            dtype="fp16",  # autocast around generator and VAE (engine_tokenbridge.py)
            labels=None,
            has_global_streams=True,
            stand_in={"num_iterations": 2},
            default_size="l",
            published="arXiv 2503.16430 v1, table 3",
            notes=(),
        ),
        Kind(
            name="mar",
            model_class=MAR,
            layout=mar_layout,
            presets=mar_presets.PRESETS,
            load=mar_checkpoint.load_mar,
            has_average=True,
            flop=mar_cost.count_flop,
            tokenizer=KL16,
            recipe="vae",
            dtype="fp16",  # autocast around generator and VAE (engine_mar.py)
            labels=None,
            has_global_streams=True,
            # "ddim": from the middle of the process on. At its noisy end random weights would give latents of 1e4,
            # too large for half precision.
            stand_in={"num_iterations": 2, "num_diffusion_steps": "ddim2"},
            default_size="l",
            published="README.md of LTH14/mar at fe470ac",
            notes=(_PRECISION_RECALL,),
        ),
        Kind(
            name="llamagen",
            model_class=LlamaGen,
            layout=llamagen_layout,
            presets=llamagen_presets.PRESETS,
            load=llamagen_checkpoint.load_llamagen,
            has_average=False,
            flop=llamagen_cost.count_flop,
            tokenizer=VQ16,
            recipe="vq",
            dtype="bf16",  # of the weights; the tokenizer is in float32 (sample_c2i_ddp.py)
            labels="random",
            has_global_streams=True,
            stand_in={},
            default_size="3b",
            published="README.md of FoundationVision/LlamaGen at ce98ec4",
            notes=(
                "The published FID is by ADM's TensorFlow evaluator; ours by torch-fidelity's port of its Inception.",
                "Other scores as published: TokenBridge's table 3 (arXiv 2503.16430 v1).",
                "Labels are random and not balanced, as in sample_c2i_ddp.py; images of 384 pixels are scaled to 256.",
                "The official script seeds with its seed times the number of processes, plus rank; here with seed plus "
                "rank. The two agree at seed 0, its default.",
            ),
        ),
        Kind(
            name="givt",
            model_class=GIVT,
            layout=givt_layout,
            presets=givt_presets.PRESETS,
            load=givt_official.load_givt,
            has_average=False,
            flop=givt_cost.count_flop,
            tokenizer=GIVT_VAE,
            recipe="vae",
            dtype="fp32",
            labels=None,
            has_global_streams=False,
            stand_in={},
            default_size="causal-256",
            published=givt_presets.README,
            notes=(
                "The evaluation behind the published FID is not in the repository: balanced labels and rounded pixels "
                "are this project's.",
                _PRECISION_RECALL,
            ),
        ),
    )
}


def all_presets() -> dict[str, tuple[Kind, Preset]]:
    """Return the presets of all systems by name, each with its system."""
    return {name: (kind, preset) for kind in KINDS.values() for name, preset in kind.presets.items()}


def find_preset(name: str) -> tuple[Kind, Preset]:
    """Return the preset called `name`, by our name or, where only one has it, the official one.

    Raises:
        ValueError: there is none, or there are several.
    """
    known = all_presets()
    if name in known:
        return known[name]
    found = [(kind, preset) for kind, preset in known.values() if preset.official_name == name]
    if len(found) > 1:
        raise UserError(f"{name!r} may be {' or '.join(preset.name for _, preset in found)}: say which.")
    if not found:
        raise UserError(f"Unknown preset {name!r}; there are {', '.join(known)}.")
    return found[0]


def unpublished(preset: Preset) -> str | None:
    """Return what of a preset was not published and keeps it from being reproduced; None if nothing."""
    if preset.name in SHIPPED_PRESETS:
        return "it is this project's own, which `nox -s reproduce_tiny` measures"
    published = {"weights": preset.name in ARTIFACTS, "sampling settings": bool(preset.sampling)}
    lacking = [what for what, there in published.items() if not there]
    return f"no {' and no '.join(lacking)} were published" if lacking else None


def published_preset(name: str, size: str | None = None) -> tuple[Kind, Preset]:
    """Return a preset that can be reproduced: one of a name, or of a system and a size.

    Args:
        name: of a preset, or of a system.
        size: of the system (`l`, `b-256`); a part of it is enough where only one such was published. None is the
            system's default.

    Raises:
        ValueError: there is none, or several; or its weights or settings were not published.
    """
    if name not in KINDS:
        if size is not None:
            raise UserError(f"--size goes with a system ({', '.join(KINDS)}), not with the preset {name!r}.")
        kind, preset = find_preset(name)
        if reason := unpublished(preset):
            raise UserError(f"{preset.name} cannot be reproduced: {reason}.")
        return kind, preset
    kind = KINDS[name]
    wanted = f"{name}-{(size or kind.default_size).lower()}"
    there = [p for p in kind.presets.values() if p.name == wanted or p.name.startswith(f"{wanted}-")]
    usable = [p for p in kind.presets.values() if unpublished(p) is None]
    sizes = ", ".join(p.name.removeprefix(f"{name}-") for p in usable)
    found = [p for p in there if p in usable]
    if len(found) > 1:
        raise UserError(f"{name} has several of size {size}: {', '.join(p.name for p in found)}. Sizes are {sizes}.")
    if not found:
        reasons = "; ".join(f"of {p.name} {unpublished(p)}" for p in there) or "there is no such size"
        raise UserError(f"{name} of size {size!r} cannot be reproduced: {reasons}. Sizes are {sizes}.")
    return kind, found[0]


@contextmanager
def recognised_states() -> Iterator[None]:
    """Add to a `WrongStateError` whose state it is, if it has the names and shapes of a published model."""
    try:
        yield
    except WrongStateError as error:
        for name, module, layout in _published_modules():
            if {official: mapping.shape for official, mapping in layout(module).mappings.items()} == error.shapes:
                raise WrongStateError(f"{error} It is the state of {name}.", error.shapes) from error
        raise


def _published_modules() -> Iterator[tuple[str, Any, Callable[[Any], Layout]]]:
    for kind, preset in all_presets().values():
        if preset.official_name is not None:
            yield preset.name, build_preset(kind.model_class, preset), kind.layout
    for tokenizer in TOKENIZERS.values():
        yield tokenizer.key, tokenizer.create(), tokenizer.layout
