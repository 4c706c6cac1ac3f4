"""Finding models by name and loading them: the presets of all systems, and the generators of all scales.

A name is a preset (`mar-l`), a recipe of a scale (`tiny/parallel-64`), or a path together with a preset.

Shape letters: B batch, C color channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from tokenbridge.configs import scales
from tokenbridge.configs.schema import Recipe, Scale
from tokenbridge.models.masked_sampling import MaskedSampling, masked_counts
from tokenbridge.models.noise import Official, PerImage
from tokenbridge.models.registry import (
    SHIPPED_PRESETS,
    SYSTEMS,
    all_presets,
    find_preset,
    load_published,
    load_published_tokenizer,
)
from tokenbridge.models.system import FLOP, System, change_settings
from tokenbridge.sampling.config import RunConfig, run_labels
from tokenbridge.sampling.run import refuse
from tokenbridge.tokenizers.base import LatentTokenizer, VQTokenizer
from tokenbridge.tokenizers.cost import decoder_flop
from tokenbridge.tokenizers.kl16 import kl16_layout
from tokenbridge.tokenizers.llamagen_vq import EVALUATED_SIZE, LlamaGenVQ
from tokenbridge.utils import files
from tokenbridge.utils.devices import DTYPES, Dtype
from tokenbridge.utils.errors import MissingFileError, UserError
from tokenbridge.utils.hashed import recording
from tokenbridge.weights.artifacts import ARTIFACTS, Artifact, resolve, status
from tokenbridge.weights.diffusers import (
    CONFIG_FILE,
    PIPELINE_FILE,
    WEIGHTS_FILE,
    load_model,
    model_folder,
    plain_config,
)
from tokenbridge.weights.official import Layout, flat_layout, load_official
from tokenbridge.weights.published import Preset
from tokenbridge.weights.rule import RULE, rule_state
from tokenbridge.weights.torch_files import CHECKPOINT

GENERATOR, VAE = "transformer", "vae"  # the folders of a pipeline
_HARMLESS = ("sample_size", "force_upcast")  # settings of a VAE that no image depends on
STAND_IN_IMAGES = 2  # the smallest number of images that tests the whole path
STAND_IN_RULE = {"rule": RULE, "salt": "stand-in"}
AUTOENCODERS: dict[str, Any] = {"vae": AutoencoderKL, "vq": VQModel}  # by name of their recipe at every scale


# ------------------------------------------------------------------------------------------------ not loaded yet


@dataclass(frozen=True)
class NamedModel:
    """A model that is not loaded yet: its sizes, its sampling settings, and the paths of its weights."""

    name: str
    system: System
    model: Mapping[str, Any]  # keyword arguments of the model's class
    settings: Any  # sampling settings
    create_decoder: Callable[[], Any]  # () -> the tokenizer's autoencoder on the meta device
    decoder_layout: Callable[[Any], Layout]
    load_model: Callable[[Path], Any]
    load_decoder: Callable[[Path], Any]
    weights: Path | None  # the generator's file or folder; None if the user did not name one
    vae: Path | None  # the tokenizer's file or folder; None if the user did not name one

    is_published: bool  # the model was evaluated by its authors

    @property
    def num_positions(self) -> int:
        """The number of positions of an image."""
        if "num_positions" in self.model:
            return int(self.model["num_positions"])
        return int((self.model["latent_size"] // self.model.get("patch_size", 1)) ** 2)

    @property
    def num_iterations(self) -> int:
        """The number of passes for an image: the iterations of a masked model, or one pass for each position."""
        masked = isinstance(self.settings, MaskedSampling)
        return self.settings.num_iterations if masked else self.num_positions

    @property
    def labels(self) -> Literal["random"] | None:
        """The labels of the published evaluation (`RunConfig.labels`); None means balanced labels."""
        return self.system.evaluation.labels if self.is_published else None

    @property
    def channels(self) -> int:
        """The number of color channels of the images."""
        return image_channels(self.create_decoder())

    @property
    def image_size(self) -> int:
        """The height and width of the images."""
        side = math.isqrt(self.num_positions) * self.model.get("patch_size", 1)
        return image_size(side, self.create_decoder())

    def sampled(self, **changes: Any) -> NamedModel:
        """Return the same model with some sampling settings replaced.

        Raises:
            UserError: a setting does not exist, or its value is out of range.
        """
        return replace(self, settings=change_settings(self.name, self.settings, changes))

    def for_stand_in(self) -> NamedModel:
        """Return the same model with settings that make sampling with stand-in weights quick."""
        return self.sampled(**self.system.quick)

    def check(self, config: RunConfig) -> None:
        """Check that the model can make the images of a run, before anything is loaded.

        Raises:
            UserError: there are more iterations than positions, a label is out of range, or the official randomness is
                asked for and torch cannot reproduce it.
        """
        if isinstance(self.settings, MaskedSampling):
            masked_counts(self.num_positions, self.settings.num_iterations)
        run_labels(config, self.model["num_classes"])
        if config.randomness == "official" and not self.system.has_official_noise:
            raise UserError(
                f"{self.name} has no official randomness, because its official code draws with JAX, whose random "
                "numbers torch cannot reproduce. Use per-image randomness."
            )

    def dtype(self, name: str | None, device: torch.device) -> Dtype:
        """Return the precision called `name`.

        None means the precision of the published evaluation for a published model on a GPU, and otherwise float32.
        """
        if name is None:
            return self.system.evaluation.dtype if self.is_published and device.type == "cuda" else "fp32"
        if name not in get_args(Dtype):
            raise UserError(f"Unknown dtype {name!r}; there are {', '.join(get_args(Dtype))}.")
        return cast("Dtype", name)

    def flop_per_image(self) -> FLOP:
        """Count the operations of one image by part: those of the generator's parts and of the tokenizer's decoder."""
        model = on_meta(self.system.model, self.model)
        decoder = {f"{self.system.recipe.upper()} decoder": decoder_flop(self.create_decoder(), model.latent_size)}
        return {**self.system.count_flop(model, self.settings), **decoder}

    def missing(self) -> list[str]:
        """Return a line for each missing file, which says where it was looked for or how to name it."""
        options = (("generator", "--weights", self.weights), (self.system.tokenizer.part, "--vae", self.vae))
        return [
            f"{part} of {self.name}: " + (f"there is no {path}" if path else f"name its file or folder with {option}")
            for part, option, path in options
            if path is None or not path.exists()
        ]

    def missing_artifacts(self) -> list[Artifact]:
        """Return the published files that the user did not name and that are not in the usual places."""
        paths = ((self.name, self.weights), (self.system.tokenizer.key, self.vae))
        keys = [key for key, path in paths if self.is_published and path is None and key in ARTIFACTS]
        return [s.artifact for s in status(keys) if s.state == "missing"]

    def with_artifacts(self) -> NamedModel:
        """Return the same published model with the paths of the files that the user did not name.

        They are looked for in the usual places and otherwise downloaded (see `weights.artifacts.resolve`).

        Raises:
            MissingArtifactsError: files are missing and cannot be downloaded; the message lists all of them.
        """
        if not (self.is_published and self.missing() and (self.weights is None or self.vae is None)):
            return self
        tokenizer = self.system.tokenizer.key
        found = resolve([self.name, tokenizer], given={self.name: self.weights, tokenizer: self.vae})
        return replace(self, weights=found[self.name], vae=found[tokenizer])

    def load(self, device: torch.device, *, dtype: Dtype = "fp32", compiled: bool = False) -> ModelSampler:
        """Load the weights of the generator and of the tokenizer.

        Raises:
            MissingFileError: files are missing; the message lists all of them.
            UserError: a file is damaged or holds another model, or the model cannot be compiled.
        """
        self._check_compiled(compiled)
        if missing := self.missing():
            raise MissingFileError(f"Files are missing. {'; '.join(missing)}.")
        assert self.weights is not None
        assert self.vae is not None
        with recording() as of_model:
            model = self.load_model(self.weights)
        with recording() as of_decoder:
            decoder = self.load_decoder(self.vae)
        read = {"generator": _hash_of_weights(of_model), self.system.recipe: _hash_of_weights(of_decoder)}
        return self._sampler(model, decoder, read, device, dtype, compiled)

    def stand_in(self, device: torch.device, *, dtype: Dtype = "fp32", compiled: bool = False) -> ModelSampler:
        """Return a sampler with random weights (`draw_rule`), which costs as much as the model and gives no result."""
        self._check_compiled(compiled)
        model, decoder = on_meta(self.system.model, self.model), self.create_decoder()
        for module, layout_of in ((model, self.system.layout), (decoder, self.decoder_layout)):
            layout = layout_of(module)
            load_official(module, rule_state(layout, STAND_IN_RULE), layout)
        return self._sampler(model, decoder, {}, device, dtype, compiled)

    def _check_compiled(self, compiled: bool) -> None:
        if compiled and self.system.compiled_part is None:
            raise UserError(f"{self.name} cannot be compiled, because it would be compiled again for every token.")

    def _sampler(
        self, model: Any, decoder: Any, weights: Mapping[str, str], device: torch.device, dtype: Dtype, compiled: bool
    ) -> ModelSampler:
        # diffusers' own `to` would warn about a list of modules that is empty here, so nn.Module's is called.
        nn.Module.to(model, device, DTYPES[dtype] if self.system.casts_weights else torch.float32)
        nn.Module.to(decoder, device, torch.float32)
        if compiled:
            assert self.system.compiled_part is not None
            # The number of visible positions grows from iteration to iteration, so shapes are dynamic.
            model.get_submodule(self.system.compiled_part).compile(dynamic=True)
            decoder.decoder.compile()
        name = self.name if weights else f"{self.name}, stand-in weights, no result"
        return ModelSampler(name, self.system, model, as_tokenizer(decoder), self.settings, dtype, weights, compiled)


def find_model(
    name: str,
    *,
    preset: str | None = None,
    variant: str | None = None,
    weights: Path | None = None,
    vae: Path | None = None,
) -> NamedModel:
    """Return the model called `name`, which is not loaded yet.

    Args:
        name: a preset, SCALE/RECIPE, or the path of a checkpoint or of a model folder.
        preset: the preset of the model at the path `name`.
        variant: name of the preset's sampling settings; None means the default ones.
        weights: for a preset, the official file, the folder that holds it, or a converted folder; for SCALE/RECIPE,
            the folder that holds all models of the scale.
        vae: the tokenizer's official file or a converted folder; for SCALE/RECIPE, None means the tokenizer in the
            folder of the scale's models.

    Raises:
        UserError: the name or the variant is unknown, the recipe is not a generator, or a path has no preset.
    """
    known = all_presets()
    if name not in known and _recipe_of(name) is None and Path(name).exists():
        if preset is None:
            raise UserError(f"{name} is a path: name the model that it holds with --preset ({', '.join(known)}).")
        if weights is not None:
            raise UserError("Weights are given twice: as the model's path, and with --weights.")
        found = find_model(find_preset(preset)[1].name, variant=variant, vae=vae or _of_pipeline(Path(name)))
        return replace(found, weights=Path(name))
    if preset is not None:
        raise UserError(f"--preset names the model that a path holds, but there is no path {name!r}.")
    if name in known and name not in SHIPPED_PRESETS:
        return _published(*known[name], variant, weights, vae)
    recipe_of = _recipe_of(SHIPPED_PRESETS.get(name, name))
    if recipe_of is None:
        raise UserError(f"Unknown model {name!r}; there are {', '.join([*known, *_generators()])}, and paths.")
    scale, recipe = recipe_of
    if recipe.sampling is None:
        raise UserError(f"{name!r} is not a generator.")
    if variant is not None and name not in SHIPPED_PRESETS:
        raise UserError(f"{name} has no variants.")
    model = scale_model(scale, recipe, weights or files.reference_folder() / scale.name / "weights")
    if name in SHIPPED_PRESETS:
        model = replace(model, settings=known[name][1].sampling_config(variant))
    return replace(model, name=name, vae=vae or model.vae)


def scale_model(scale: Scale, recipe: Recipe, weights: Path) -> NamedModel:
    """Return a generator of a scale; `weights` holds the models of the scale (see `scales.find_model_folder`)."""
    system = SYSTEMS[recipe.kind]
    decoder, decoder_class = scale.recipe(system.recipe), AUTOENCODERS[system.recipe]

    def load_decoder(path: Path) -> Any:
        folder = model_folder(path, VAE) or path
        scales.check_tokenizer(recipe.name, weights, folder)
        return load_model(decoder_class, folder, decoder.model)

    return NamedModel(
        name=f"{scale.name}/{recipe.name}",
        system=system,
        model=recipe.model,
        settings=recipe.sampling,
        create_decoder=partial(on_meta, decoder_class, decoder.model),
        decoder_layout=kl16_layout if decoder_class is AutoencoderKL else flat_layout,
        load_model=lambda path: load_model(system.model, model_folder(path, GENERATOR) or path, recipe.model),
        load_decoder=load_decoder,
        weights=weights / recipe.name,
        vae=scales.find_model_folder(scale, decoder.name, weights),
        is_published=False,
    )


def _published(
    system: System, preset: Preset, variant: str | None, weights: Path | None, vae: Path | None
) -> NamedModel:
    tokenizer = system.tokenizer

    def load(path: Path) -> Any:
        if (folder := model_folder(path, GENERATOR)) is not None:
            return load_model(system.model, folder, preset.model)
        return load_published(system, weights_file(path, preset.name), preset.name)

    def load_decoder(path: Path) -> Any:
        if (folder := model_folder(path, VAE)) is not None:
            published = plain_config(tokenizer.create())
            return load_model(tokenizer.model, folder, {k: v for k, v in published.items() if k not in _HARMLESS})
        return load_published_tokenizer(tokenizer, weights_file(path, tokenizer.key))

    return NamedModel(
        name=preset.name,
        system=system,
        model=preset.model,
        settings=preset.sampling_config(variant),
        create_decoder=tokenizer.create,
        decoder_layout=tokenizer.layout,
        load_model=load,
        load_decoder=load_decoder,
        weights=weights,
        vae=vae or _of_pipeline(weights),
        is_published=True,
    )


def weights_file(path: Path, key: str) -> Path:
    """Return the file that holds the weights of the preset or tokenizer `key`.

    Args:
        path: an official file, a folder that holds one, or a model folder of diffusers.
    """
    if not path.is_dir():
        return path
    if (path / CONFIG_FILE).is_file():
        return path / WEIGHTS_FILE
    return path / (Path(ARTIFACTS[key].file).name if key in ARTIFACTS else CHECKPOINT)


def _of_pipeline(weights: Path | None) -> Path | None:
    """Return the path of the weights if a pipeline lies there, which holds the tokenizer too."""
    return weights if weights is not None and (weights / PIPELINE_FILE).is_file() else None


def _hash_of_weights(read: Mapping[Path, str]) -> str:
    """Return the hash of the one file of weights among the files that were read for a model."""
    (sha256,) = (sha256 for path, sha256 in read.items() if path.name != CONFIG_FILE)
    return sha256


def on_meta(model_class: Any, arguments: Mapping[str, Any]) -> Any:
    """Build a model from keyword arguments, on the meta device and in evaluation mode."""
    with torch.device("meta"):
        return model_class(**arguments).eval()


def _recipe_of(name: str) -> tuple[Scale, Recipe] | None:
    """Return the scale and the recipe that `name` = SCALE/RECIPE stands for; None if no scale has this name.

    Raises:
        UserError: the scale has no such recipe.
    """
    scale, slash, recipe = name.partition("/")
    if not slash or scale not in scales.SCALES:
        return None
    return scales.SCALES[scale], scales.SCALES[scale].recipe(recipe)


def _generators() -> Iterable[str]:
    return (f"{s.name}/{r.name}" for s in scales.SCALES.values() for r in s.recipes if r.is_generator)


# ------------------------------------------------------------------------------------------------------- loaded


@dataclass(frozen=True)
class ModelSampler:
    """A generator of any system with its tokenizer, both loaded: the `run.Sampler` that makes images."""

    name: str
    system: System
    model: Any
    tokenizer: Any  # `LatentTokenizer`, `VQTokenizer` or `LlamaGenVQ`
    settings: Any  # sampling settings
    dtype: Dtype
    weights: Mapping[str, str]  # the SHA-256 of the files that were read, by part; empty for stand-in weights
    compiled: bool = False

    @property
    def stand_in(self) -> bool:
        """Whether the weights are stand-ins, drawn by a rule."""
        return not self.weights

    @property
    def num_classes(self) -> int:
        """The number of class labels."""
        return int(self.model.num_classes)

    @property
    def image_size(self) -> int:
        """The height and width of the images."""
        return image_size(self.model.latent_size, decoder_of(self.tokenizer))

    @property
    def channels(self) -> int:
        """The number of color channels of the images."""
        return image_channels(decoder_of(self.tokenizer))

    @torch.inference_mode()
    def images(self, labels: Tensor, indices: Sequence[int], seed: int | None) -> Tensor:
        """Make a batch of images (see `run.Sampler.images`)."""
        with self.autocast():  # the official evaluations of TokenBridge and MAR run the VAE under autocast too
            latents = self.system.to_latents(self.model, self.generate(labels, indices, seed))
            images = self.tokenizer.images(latents)
        refuse(~images.flatten(1).isfinite().all(dim=1), "has NaN pixels")
        pixels: Tensor = self.tokenizer.to_pixels(images)
        return pixels.cpu()

    def generate(self, labels: Tensor, indices: Sequence[int], seed: int | None) -> Tensor:
        """Return the tokens or latents of a batch of images (see `System.generate`).

        Raises:
            BadImageError: the logits of an image are NaN.
        """
        noise = Official() if seed is None else PerImage(seed, list(indices))
        generated = self.system.generate(self.model, labels, self.settings, noise)
        if not generated.is_floating_point():
            refuse(generated.flatten(1).amin(dim=1) < 0, "has NaN logits")
        return generated

    def describe(self) -> dict[str, Any]:
        """Return settings, precision, sizes, and the SHA-256 of the weights (see `run.Sampler.describe`)."""
        return {
            "system": self.system.name,
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "sampling": asdict(self.settings),
            "dtype": self.dtype,
            "compiled": self.compiled,
            "weights": dict(self.weights) or STAND_IN_RULE,
            "config": {
                "generator": plain_config(self.model),
                self.system.recipe: plain_config(decoder_of(self.tokenizer)),
            },
            **self.system.facts(self.model),
        }

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context of the model, which does nothing if the weights themselves were cast."""
        enabled = self.dtype != "fp32" and not self.system.casts_weights
        return torch.autocast(self.model.device.type, DTYPES[self.dtype], enabled=enabled)


def as_tokenizer(decoder: Any) -> Any:
    """Return the tokenizer of an autoencoder."""
    if isinstance(decoder, LlamaGenVQ):
        return decoder
    return VQTokenizer(decoder) if isinstance(decoder, VQModel) else LatentTokenizer(decoder)


def decoder_of(tokenizer: Any) -> Any:
    """Return the autoencoder of a tokenizer; this is the inverse of `as_tokenizer`."""
    if isinstance(tokenizer, LatentTokenizer):
        return tokenizer.autoencoder
    return tokenizer.model if isinstance(tokenizer, VQTokenizer) else tokenizer


def image_size(latent_size: int, decoder: Any) -> int:
    """Return the height and width of the images that an autoencoder decodes, which may be on the meta device.

    Every level but one doubles the size of the latents. LlamaGen's images are scaled down to 256 if they are larger.
    """
    names = ("block_out_channels", "width_multipliers", "decoder_multipliers")
    levels = next(decoder.config[name] for name in names if name in decoder.config)
    size = int(latent_size * 2 ** (len(levels) - 1))
    return min(size, EVALUATED_SIZE) if isinstance(decoder, LlamaGenVQ) else size


def image_channels(decoder: Any) -> int:
    """Return the number of color channels of an autoencoder's images; LlamaGen's always have three."""
    config = decoder.config
    return int(config.get("out_channels") or config.get("image_channels") or 3)
