"""Systems by name: every preset of TokenBridge, MAR, LlamaGen and GIVT, and every generator of a scale.

A system is what a sampling run can use, before its weights are loaded: sizes, settings, where the files are, what an
image costs. A name is a preset (`mar-l`), a recipe of a scale (`tiny/parallel-64`), or a path, with the preset it
holds. `KINDS` is the one table of what is particular to a system; commands, tables and sessions go by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from diffusers import AutoencoderKL, VQModel
from torch import nn

from tokenbridge.configs import scales as recipes
from tokenbridge.configs import schema as configs_schema
from tokenbridge.models.mar.model import MAR
from tokenbridge.models.masked_sampling import MaskedSampling, masked_counts
from tokenbridge.models.registry import KINDS, SHIPPED_PRESETS, TOKENIZERS, Kind, all_presets, find_preset
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.sampling.config import RunConfig, run_labels
from tokenbridge.sampling.run import RunReport, sampling_run
from tokenbridge.sampling.samplers import (
    SAMPLERS,
    STAND_IN_SALT,
    ModelSampler,
    as_tokenizer,
    image_channels,
    image_size,
)
from tokenbridge.tokenizers.cost import decoder_flop
from tokenbridge.utils import files
from tokenbridge.utils.devices import DTYPES, Dtype, process_state
from tokenbridge.utils.errors import MissingFileError, UserError
from tokenbridge.utils.files import replacing_folder
from tokenbridge.weights.artifacts import ARTIFACTS, resolve
from tokenbridge.weights.diffusers import WEIGHTS_FILE, load_model
from tokenbridge.weights.official import check_replaceable, flat_layout, load_official
from tokenbridge.weights.published import Preset
from tokenbridge.weights.rule import RULE, rule_state

CHECKPOINT = "checkpoint-last.pth"
STAND_IN_IMAGES = 2  # as few as prove the path


# ------------------------------------------------------------------------------------------------------- systems


@dataclass(frozen=True)
class System:
    """A model by name: its sizes and settings, and where its weights are; nothing is loaded yet."""

    name: str
    kind: Kind
    model: Mapping[str, Any]  # keyword arguments of its class
    create_decoder: Callable[[], Any]  # the tokenizer's autoencoder, on the meta device
    sampling: Any  # settings of its kind
    load_model: Callable[[Path], Any]
    load_decoder: Callable[[Path], Any]
    weights: Path | None  # None: nobody said where
    vae: Path | None  # the tokenizer's; likewise

    is_published: bool  # evaluated by its authors

    @property
    def num_positions(self) -> int:
        """Positions of an image."""
        if "num_positions" in self.model:
            return int(self.model["num_positions"])
        return int((self.model["latent_size"] // self.model.get("patch_size", 1)) ** 2)

    @property
    def num_iterations(self) -> int:
        """Passes of the model for an image: a masked model's iterations, or one for each position."""
        masked = isinstance(self.sampling, MaskedSampling)
        return self.sampling.num_iterations if masked else self.num_positions

    @property
    def labels(self) -> Literal["random"] | None:
        """Labels of the published evaluation, for `RunConfig`; None: balanced."""
        return self.kind.labels if self.is_published else None

    @property
    def channels(self) -> int:
        """Colour channels of the images."""
        return image_channels(self.create_decoder())

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        side = math.isqrt(self.num_positions) * self.model.get("patch_size", 1)
        return image_size(side, self.create_decoder())

    def sampled(self, **changes: Any) -> System:
        """Return the same system with other sampling settings.

        Raises:
            ValueError: settings that this system does not have, or values out of range.
        """
        known = [field.name for field in fields(self.sampling)]
        if unknown := sorted(changes.keys() - set(known)):
            raise UserError(f"{self.name} has no setting {', '.join(unknown)}; it has {', '.join(known)}.")
        return replace(self, sampling=replace(self.sampling, **changes))

    def for_stand_in(self) -> System:
        """Return the same system with settings that make a stand-in quick."""
        return self.sampled(**self.kind.stand_in)

    def check(self, config: RunConfig) -> None:
        """Check settings and run against the model, before anything is loaded.

        Raises:
            ValueError: more iterations than positions, labels that are no classes, or randomness that torch cannot
                make.
        """
        if isinstance(self.sampling, MaskedSampling):
            masked_counts(self.num_positions, self.sampling.num_iterations)
        run_labels(config, self.model["num_classes"])
        if config.randomness == "official" and not self.kind.has_global_streams:
            raise UserError(
                f"{self.name} has no official randomness here: its official code draws with JAX, whose numbers torch "
                "cannot make. Take per-image randomness."
            )

    def dtype(self, name: str | None, device: torch.device) -> Dtype:
        """Return the precision called `name`; if None the official one on GPUs, and float32 for all else."""
        if name is None:
            return self.kind.dtype if self.is_published and device.type == "cuda" else "fp32"
        if name not in get_args(Dtype):
            raise UserError(f"Unknown dtype {name!r}; there are {', '.join(get_args(Dtype))}.")
        return cast("Dtype", name)

    def flop_per_image(self) -> dict[str, float]:
        """Count the operations of one image by part: those of the generator, and the tokenizer's decoder."""
        model = on_meta(self.kind.model_class, self.model)
        decoder = {f"{self.kind.recipe.upper()} decoder": decoder_flop(self.create_decoder(), model.latent_size)}
        return {**self.kind.flop(model, self.sampling), **decoder}

    def missing(self) -> list[str]:
        """Return what is not there, one line each: what, where it was looked for, how to name it."""
        options = (("generator", "--weights", self.weights), (self.kind.tokenizer.part, "--vae", self.vae))
        return [
            f"{part} of {self.name}: " + (f"there is no {path}" if path else f"name its file or folder with {option}")
            for part, option, path in options
            if path is None or not path.exists()
        ]

    def load(self, device: torch.device, *, dtype: Dtype = "fp32", compiled: bool = False) -> ModelSampler:
        """Load the weights.

        Raises:
            FileNotFoundError: some are missing; the message lists them all.
            ValueError: files that are damaged or of another model; compilation of a model that gains nothing by it.
        """
        self._check_compiled(compiled)
        if missing := self.missing():
            raise MissingFileError(f"Files are missing. {'; '.join(missing)}.")
        assert self.weights is not None
        assert self.vae is not None
        files = {
            "generator": weights_file(self.weights, self.name),
            self.kind.recipe: weights_file(self.vae, self.kind.tokenizer.key),
        }
        model, decoder = self.load_model(self.weights), self.load_decoder(self.vae)
        return self._sampler(model, decoder, files, device, dtype, compiled)

    def stand_in(self, device: torch.device, *, dtype: Dtype = "fp32", compiled: bool = False) -> ModelSampler:
        """Draw all weights by the golden rule: the same model in size and work, and no result."""
        self._check_compiled(compiled)
        model, decoder = on_meta(self.kind.model_class, self.model), self.create_decoder()
        decoder_layout = flat_layout if isinstance(decoder, VQModel) else self.kind.tokenizer.layout
        for module, layout_of in ((model, self.kind.layout), (decoder, decoder_layout)):
            layout = layout_of(module)
            load_official(module, rule_state(layout, {"rule": RULE, "salt": STAND_IN_SALT}), layout)
        return self._sampler(model, decoder, {}, device, dtype, compiled)

    @property
    def _sampler_class(self) -> type[ModelSampler]:
        return SAMPLERS[self.kind.name]

    def _check_compiled(self, compiled: bool) -> None:
        if compiled and not issubclass(self.kind.model_class, TokenBridge | MAR):
            raise UserError(f"{self.name} cannot be compiled: it would be compiled anew for every token.")

    def _sampler(
        self, model: Any, decoder: Any, files: Mapping[str, Path], device: torch.device, dtype: Dtype, compiled: bool
    ) -> ModelSampler:
        # nn.Module's own: diffusers' method warns of a list of modules that is empty here.
        nn.Module.to(model, device, DTYPES[dtype] if self._sampler_class.casts_weights else torch.float32)
        nn.Module.to(decoder, device, torch.float32)
        if compiled:
            # What nearly all the work is in; the number of visible positions grows, so shapes are dynamic.
            model.backbone.compile(dynamic=True)
            decoder.decoder.compile()
        name = self.name if files else f"{self.name}, stand-in weights, no result"
        return self._sampler_class(name, model, as_tokenizer(decoder), self.sampling, dtype, files, compiled)


def find_system(
    name: str,
    *,
    preset: str | None = None,
    variant: str | None = None,
    weights: Path | None = None,
    vae: Path | None = None,
) -> System:
    """Return the system called `name`.

    Args:
        name: a preset, SCALE/RECIPE, or the path of a checkpoint or model folder.
        preset: which model is at the path `name`.
        variant: of the preset's sampling settings; the default one if None.
        weights: of a preset, the official file, its folder, or a converted folder; of a scale, its folder of models.
        vae: the tokenizer's official file or a converted folder; of a scale, the one among its models by default.

    Raises:
        ValueError: an unknown name or variant, a recipe that is no generator, a path without a preset.
    """
    known = all_presets()
    if name not in known and _recipe_of(name) is None and Path(name).exists():
        if preset is None:
            raise UserError(f"{name} is a path: say with --preset which model is there ({', '.join(known)}).")
        if weights is not None:
            raise UserError("Weights are given twice: as the model's path, and with --weights.")
        system = find_system(find_preset(preset)[1].name, variant=variant, vae=vae)
        return replace(system, weights=Path(name))
    if preset is not None:
        raise UserError(f"--preset says which model a path holds, but there is no path {name!r}.")
    if name in known and name not in SHIPPED_PRESETS:
        return _published(*known[name], variant, weights, vae)
    found = _recipe_of(SHIPPED_PRESETS.get(name, name))
    if found is None:
        raise UserError(f"Unknown model {name!r}; there are {', '.join([*known, *_generators()])}, and paths.")
    scale, recipe = found
    if recipe.sampling is None:
        raise UserError(f"{name!r} is no generator.")
    if name in SHIPPED_PRESETS:
        sampling = known[name][1].sampling_config(variant)
    elif variant is None:
        sampling = recipe.sampling
    else:
        raise UserError(f"{name} has no variants.")
    kind, folder = KINDS[recipe.kind], weights or files.reference_folder() / scale.name / "weights"
    decoder, decoder_class = scale.recipe(kind.recipe), {"vae": AutoencoderKL, "vq": VQModel}[kind.recipe]
    return System(
        name=name,
        kind=kind,
        model=recipe.model,
        create_decoder=partial(on_meta, decoder_class, decoder.model),
        sampling=sampling,
        load_model=lambda path: load_model(kind.model_class, path, recipe.model),
        load_decoder=lambda path: load_model(decoder_class, path, decoder.model),
        weights=folder / recipe.name,
        vae=vae or folder / decoder.name,
        is_published=False,
    )


def _published(kind: Kind, preset: Preset, variant: str | None, weights: Path | None, vae: Path | None) -> System:
    def load(path: Path) -> Any:
        if (path / "config.json").is_file():
            return load_model(kind.model_class, path, preset.model)
        return kind.load_published(weights_file(path, preset.name), preset.name)

    def load_decoder(path: Path) -> Any:
        if (path / "config.json").is_file():
            return load_model(kind.tokenizer.model_class, path)
        return kind.tokenizer.load_published(weights_file(path, kind.tokenizer.key))

    return System(
        name=preset.name,
        kind=kind,
        model=preset.model,
        create_decoder=kind.tokenizer.create,
        sampling=preset.sampling_config(variant),
        load_model=load,
        load_decoder=load_decoder,
        weights=weights,
        vae=vae,
        is_published=True,
    )


def weights_file(path: Path, key: str) -> Path:
    """Return the file that holds the weights of a path: an official file, a folder of it, or a diffusers folder."""
    if not path.is_dir():
        return path
    if (path / "config.json").is_file():
        return path / WEIGHTS_FILE
    return path / (Path(ARTIFACTS[key].file).name if key in ARTIFACTS else CHECKPOINT)


def on_meta(model_class: Any, arguments: Mapping[str, Any]) -> Any:
    """Build a model of these keyword arguments on the meta device, in evaluation mode."""
    with torch.device("meta"):
        return model_class(**arguments).eval()


def _recipe_of(name: str) -> tuple[configs_schema.Scale, configs_schema.Recipe] | None:
    """Return the recipe called SCALE/RECIPE, or None if there is no such scale.

    Raises:
        ValueError: the scale has no such recipe.
    """
    scale, slash, recipe = name.partition("/")
    if not slash or scale not in recipes.SCALES:
        return None
    return recipes.SCALES[scale], recipes.SCALES[scale].recipe(recipe)


def _generators() -> Iterable[str]:
    return (f"{s.name}/{r.name}" for s in recipes.SCALES.values() for r in s.recipes if r.is_generator)


# ---------------------------------------------------------------------------------------- conversion and listing


def convert(path: Path | str, folder: Path | str, name: str, *, ema: bool = True) -> None:
    """Write a published file as a diffusers model folder: config.json and one safetensors, in the file's number type.

    Args:
        path: the official file, or its folder.
        folder: what to write; whole or not at all, replacing what is there.
        name: of a preset of any system, or of a tokenizer (`TOKENIZERS`).
        ema: of TokenBridge and MAR, take the moving average of the weights, as published; or the last ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown name; a file that is damaged or of another model; `official.check_replaceable`.
    """
    check_replaceable(folder, "config.json")
    path = Path(path)
    if name in TOKENIZERS:
        model = TOKENIZERS[name].load_published(weights_file(path, name))
    else:
        kind, preset = find_preset(name)
        model = kind.load_published(weights_file(path, preset.name), preset.name, ema=ema)
    with replacing_folder(folder) as temporary:
        # One file whatever its size: what `load_model` reads.
        model.save_pretrained(temporary, safe_serialization=True, max_shard_size="1TB")


def with_artifacts(system: System) -> System:
    """Fill in the files of a published system that nobody named: from the usual places, or by download.

    Raises:
        MissingArtifactsError: files cannot be had; the message lists all of them.
    """
    if system.missing() and (system.weights is None or system.vae is None):
        tokenizer = system.kind.tokenizer.key
        files = resolve([system.name, tokenizer], given={system.name: system.weights, tokenizer: system.vae})
        return replace(system, weights=files[system.name], vae=files[tokenizer])
    return system


def sample(
    model: str = "tokenbridge-tiny",
    *,
    out: Path | str,
    num_images: int = 100,
    labels: tuple[int, ...] | None = None,
    seed: int = 0,
    batch_size: int = 16,
    weights: Path | None = None,
    vae: Path | None = None,
    show_progress: bool = True,
    **settings: Any,
) -> RunReport:
    """Generate images with a model by name, as the command `sample` does; a run that was killed goes on where it was.

    Args:
        model: a preset (`tokenbridge-l`) or a recipe of a scale (`tiny/parallel-64`).
        out: folder of the run; images go to `out/samples/images`.
        num_images: how many.
        labels: a class for each image; None: as the system's own evaluation.
        seed: an image is a function of seed, number and label.
        batch_size: images at a time.
        weights: the generator's file; the usual places by default.
        vae: the tokenizer's file.
        show_progress: on stderr.
        settings: of sampling, as `guidance_scale`; the model's own by default.

    Raises:
        MissingArtifactsError: files cannot be had; the message lists all of them.
        ValueError: an unknown model or setting, or one out of range.
    """
    system = find_system(model, weights=weights, vae=vae).sampled(**settings)
    config = RunConfig(num_images, system.labels if labels is None else labels, seed, batch_size=batch_size)
    system.check(config)
    if system.is_published:
        system = with_artifacts(system)
    device = process_state().device
    sampler = system.load(device, dtype=system.dtype(None, device))
    return sampling_run(sampler, config, out, show_progress=show_progress)
