"""TokenBridge as a system that a sampling run can use: by name, from files, or with stand-in weights.

A name is a preset (`tokenbridge-l`), a recipe of a scale (`tiny/parallel-64`), or a path, with the preset it holds.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tokenbridge import recipes
from tokenbridge.data import images_to_pixels
from tokenbridge.files import sha256_of
from tokenbridge.generator import TokenBridge
from tokenbridge.golden import RULE, rule_state
from tokenbridge.official import create_kl16, load_kl16, load_official, load_tokenbridge
from tokenbridge.orders import masked_counts
from tokenbridge.plan import tokenbridge_flop
from tokenbridge.presets import PRESETS, Preset, find_preset
from tokenbridge.run import DTYPES, Dtype, RunConfig, refuse, run_labels
from tokenbridge.sampling import SamplingConfig, generate_tokens, global_noise, image_noise
from tokenbridge.tokenizers import LatentTokenizer
from tokenbridge.weights import WEIGHTS_FILE, load_model

OFFICIAL_DTYPE: Dtype = "fp16"  # autocast around generator and VAE (engine_tokenbridge.py)

CHECKPOINT = "checkpoint-last.pth"
SHIPPED_PRESETS = {"tokenbridge-tiny": "tiny/tokenbridge-64"}  # whose weights come with the package
STAND_IN_SALT = "stand-in"
STAND_IN_IMAGES = 2  # as few as prove the path
STAND_IN_ITERATIONS = 2


@dataclass(frozen=True)
class TokenBridgeSampler:
    """A generator and its tokenizer, ready to make images; a `run.Sampler`."""

    name: str
    model: TokenBridge
    tokenizer: LatentTokenizer
    sampling: SamplingConfig
    dtype: Dtype
    files: Mapping[str, Path]  # that the weights were read from, by part; none for stand-ins
    compiled: bool = False

    @property
    def stand_in(self) -> bool:
        """Whether the weights were drawn by rule."""
        return not self.files

    @property
    def num_classes(self) -> int:
        """Number of class labels."""
        return self.model.num_classes

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return _image_size(self.model.latent_size, self.tokenizer.autoencoder)

    @property
    def channels(self) -> int:
        """Colour channels of the images."""
        return _channels(self.tokenizer.autoencoder)

    @torch.inference_mode()
    def images(self, labels: Tensor, indices: Sequence[int], seed: int | None) -> Tensor:
        """Make a batch of images (see `run.Sampler`)."""
        model, dtype = self.model, DTYPES[self.dtype]
        noise = (
            global_noise(len(labels), model.num_positions)
            if seed is None
            else image_noise(seed, list(indices), model.num_positions, model.num_channels)
        )
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            tokens = generate_tokens(model, labels, self.sampling, noise)
            images = self.tokenizer.images(model.to_latents(tokens))
        refuse(tokens.flatten(1).amin(dim=1) < 0, "has NaN logits")
        refuse(images.flatten(1).isnan().any(dim=1), "has NaN pixels")
        return images_to_pixels(images).cpu()

    def describe(self) -> dict[str, Any]:
        """Return settings, precision and the weights' SHA-256."""
        rule = {"rule": RULE, "salt": STAND_IN_SALT}
        return {
            "system": "tokenbridge",
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "channel_order": list(self.model.channel_order),
            "sampling": asdict(self.sampling),
            "dtype": self.dtype,
            "compiled": self.compiled,
            "weights": {part: sha256_of(path) for part, path in self.files.items()} or rule,
        }


@dataclass(frozen=True)
class TokenBridgeSystem:
    """A TokenBridge by name: its sizes and settings, and where its weights are; nothing is loaded yet."""

    name: str
    model: Mapping[str, Any]  # keyword arguments of `TokenBridge`
    create_vae: Callable[[], AutoencoderKL]  # on the meta device
    sampling: SamplingConfig
    load_model: Callable[[Path], TokenBridge]
    load_vae: Callable[[Path], AutoencoderKL]
    weights: Path | None  # None: nobody said where
    vae: Path | None

    is_published: bool  # evaluated by its authors, in half precision

    @property
    def num_iterations(self) -> int:
        """Iterations of the sampler."""
        return self.sampling.num_iterations

    def sampled(self, **changes: Any) -> TokenBridgeSystem:
        """Return the same system with other sampling settings (see `SamplingConfig`)."""
        return replace(self, sampling=replace(self.sampling, **changes))

    def check(self, config: RunConfig) -> None:
        """Check settings and run against the model, before anything is loaded.

        Raises:
            ValueError: more iterations than positions, or labels that are no classes.
        """
        masked_counts(self.model["latent_size"] ** 2, self.sampling.num_iterations)
        run_labels(config, self.model["num_classes"])

    def dtype(self, name: str | None, device: torch.device) -> Dtype:
        """Return the precision called `name`; if None the official one on GPUs, and float32 for all else."""
        if name is None:
            return OFFICIAL_DTYPE if self.is_published and device.type == "cuda" else "fp32"
        if name not in get_args(Dtype):
            raise ValueError(f"Unknown dtype {name!r}; there are {', '.join(get_args(Dtype))}.")
        return cast("Dtype", name)

    def flop_per_image(self) -> dict[str, float]:
        """Count the operations of one image by part (see `plan.tokenbridge_flop`)."""
        return tokenbridge_flop(self.model, self.sampling, self.create_vae())

    @property
    def channels(self) -> int:
        """Colour channels of the images."""
        return _channels(self.create_vae())

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return _image_size(self.model["latent_size"], self.create_vae())

    def missing(self) -> list[str]:
        """Return what is not there, one line each: what, where it was looked for, how to name it."""
        options = (("generator", "--weights", self.weights), ("VAE", "--vae", self.vae))
        return [
            f"{part} of {self.name}: " + (f"there is no {path}" if path else f"name its file or folder with {option}")
            for part, option, path in options
            if path is None or not path.exists()
        ]

    def load(self, device: torch.device, *, dtype: Dtype = "fp32", compiled: bool = False) -> TokenBridgeSampler:
        """Load the weights.

        Raises:
            FileNotFoundError: some are missing; the message lists them all.
            ValueError: files that are damaged or of another model.
        """
        if missing := self.missing():
            raise FileNotFoundError(f"Files are missing. {'; '.join(missing)}.")
        assert self.weights is not None
        assert self.vae is not None
        files = {"generator": _weights_file(self.weights), "vae": _weights_file(self.vae)}
        return self._sampler(self.load_model(self.weights), self.load_vae(self.vae), files, device, dtype, compiled)

    def stand_in(self, device: torch.device, *, dtype: Dtype = "fp32", compiled: bool = False) -> TokenBridgeSampler:
        """Draw all weights by the golden rule: the same model in size and work, and no result."""
        with torch.device("meta"):
            model = TokenBridge(**self.model).eval()
        vae = self.create_vae()
        for module in (model, vae):
            load_official(module, rule_state(module, {"rule": RULE, "salt": STAND_IN_SALT}))
        return self._sampler(model, vae, {}, device, dtype, compiled)

    def _sampler(
        self,
        model: TokenBridge,
        vae: AutoencoderKL,
        files: Mapping[str, Path],
        device: torch.device,
        dtype: Dtype,
        compiled: bool,
    ) -> TokenBridgeSampler:
        model.to(device)
        vae.to(device)
        if compiled:
            # What nearly all the work is in; the number of visible positions grows, so shapes are dynamic.
            model.backbone.compile(dynamic=True)
            vae.decoder.compile()
        name = self.name if files else f"{self.name}, stand-in weights, no result"
        return TokenBridgeSampler(name, model, LatentTokenizer(vae), self.sampling, dtype, files, compiled)


def find_system(
    name: str,
    *,
    shipped: Path,
    preset: str | None = None,
    variant: str | None = None,
    weights: Path | None = None,
    vae: Path | None = None,
) -> TokenBridgeSystem:
    """Return the system called `name`.

    Args:
        name: a preset, SCALE/RECIPE, or the path of a checkpoint or model folder.
        shipped: folder of results, which holds the models of a scale in SCALE/weights.
        preset: which model is at the path `name`.
        variant: of the preset's sampling settings; the default one if None.
        weights: of a preset, the official checkpoint, its folder, or a converted folder; of a scale, its folder of
            models.
        vae: `kl16.ckpt` or a diffusers folder; of a scale, the one among its models by default.

    Raises:
        ValueError: an unknown name or variant, a recipe that is no generator, a path without a preset.
    """
    if name not in PRESETS and _recipe_of(name) is None and Path(name).exists():
        if preset is None:
            raise ValueError(f"{name} is a path: say with --preset which model is there ({', '.join(PRESETS)}).")
        if weights is not None:
            raise ValueError("Weights are given twice: as the model's path, and with --weights.")
        system = find_system(find_preset(preset).name, shipped=shipped, variant=variant, vae=vae)
        return replace(system, weights=Path(name))
    if preset is not None:
        raise ValueError(f"--preset says which model a path holds, but there is no path {name!r}.")
    if name in PRESETS and name not in SHIPPED_PRESETS:
        return _published(find_preset(name), variant, weights, vae)
    found = _recipe_of(SHIPPED_PRESETS.get(name, name))
    if found is None:
        raise ValueError(f"Unknown model {name!r}; there are {', '.join([*PRESETS, *_generators()])}, and paths.")
    scale, recipe = found
    if recipe.sampling is None:
        raise ValueError(f"{name!r} is no generator.")
    if not isinstance(recipe.sampling, SamplingConfig):
        raise ValueError(f"{name!r} is no TokenBridge; reproduce_{scale.name} samples it.")
    if name in SHIPPED_PRESETS:
        sampling = find_preset(name).sampling_config(variant)
    elif variant is None:
        sampling = recipe.sampling
    else:
        raise ValueError(f"{name} has no variants.")
    folder = weights or shipped / scale.name / "weights"
    return TokenBridgeSystem(
        name=name,
        model=recipe.model,
        create_vae=partial(_on_meta, AutoencoderKL, scale.recipe("vae").model),
        sampling=sampling,
        load_model=lambda path: load_model(TokenBridge, path, recipe.model),
        load_vae=lambda path: load_model(AutoencoderKL, path, scale.recipe("vae").model),
        weights=folder / recipe.name,
        vae=vae or folder / "vae",
        is_published=False,
    )


def _published(preset: Preset, variant: str | None, weights: Path | None, vae: Path | None) -> TokenBridgeSystem:
    def load(path: Path) -> TokenBridge:
        if (path / "config.json").is_file():
            return load_model(TokenBridge, path, preset.model)
        return load_tokenbridge(path, preset.name)

    return TokenBridgeSystem(
        name=preset.name,
        model=preset.model,
        create_vae=create_kl16,
        sampling=preset.sampling_config(variant),
        load_model=load,
        load_vae=lambda path: load_model(AutoencoderKL, path) if path.is_dir() else load_kl16(path),
        weights=weights,
        vae=vae,
        is_published=True,
    )


def _weights_file(path: Path) -> Path:
    """Return the file that holds the weights of a path: an official file, its folder, or a diffusers folder."""
    if not path.is_dir():
        return path
    return path / (WEIGHTS_FILE if (path / "config.json").is_file() else CHECKPOINT)


def _image_size(latent_size: int, vae: Any) -> int:
    """Return height and width of the images; the VAE doubles the latents' at every level but one."""
    return latent_size * 2 ** (len(vae.config.block_out_channels) - 1)


def _channels(vae: Any) -> int:
    return int(vae.config.out_channels)


def _on_meta(model_class: Any, arguments: Mapping[str, Any]) -> Any:
    with torch.device("meta"):
        return model_class(**arguments).eval()


def _recipe_of(name: str) -> tuple[recipes.Scale, recipes.Recipe] | None:
    """Return the recipe called SCALE/RECIPE, or None if there is no such scale.

    Raises:
        ValueError: the scale has no such recipe.
    """
    scale, slash, recipe = name.partition("/")
    if not slash or scale not in recipes.SCALES:
        return None
    return recipes.SCALES[scale], recipes.SCALES[scale].recipe(recipe)


def _generators() -> list[str]:
    return [f"{s.name}/{r.name}" for s in recipes.SCALES.values() for r in s.recipes if r.kind == "tokenbridge"]
