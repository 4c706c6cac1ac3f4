"""Systems by name: every preset of TokenBridge, MAR, LlamaGen and GIVT, and every generator of a scale.

A system is what a sampling run can use, before its weights are loaded: sizes, settings, where the files are, what an
image costs. A name is a preset (`mar-l`), a recipe of a scale (`tiny/parallel-64`), or a path, with the preset it
holds. `KINDS` is the one table of what is particular to a system; commands, tables and sessions go by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from diffusers import AutoencoderKL, VQModel
from torch import nn

from tokenbridge import givt_official, llamagen, mar, official, presets, recipes
from tokenbridge.artifacts import ARTIFACTS, KL16_VAE, resolve
from tokenbridge.files import reference_folder, replacing_folder
from tokenbridge.flop import FLOP, givt_flop, llamagen_flop, mar_flop, tokenbridge_flop
from tokenbridge.generator import TokenBridge
from tokenbridge.givt import GIVT
from tokenbridge.givt_vae import GivtVAE
from tokenbridge.golden import RULE, rule_state
from tokenbridge.llamagen import LlamaGen
from tokenbridge.llamagen_vq import LlamaGenVQ, create_vq, load_vq
from tokenbridge.mar import MAR
from tokenbridge.official import check_replaceable, create_kl16, load_kl16, load_official
from tokenbridge.orders import masked_counts
from tokenbridge.presets import Preset
from tokenbridge.run import DTYPES, Dtype, RunConfig, RunReport, process_state, run_labels, sampling_run
from tokenbridge.samplers import (
    STAND_IN_SALT,
    GivtSampler,
    LlamaGenSampler,
    MarSampler,
    ModelSampler,
    TokenBridgeSampler,
    as_tokenizer,
    image_channels,
    image_size,
)
from tokenbridge.sampling import MaskedSamplingConfig
from tokenbridge.weights import WEIGHTS_FILE, load_model

CHECKPOINT = "checkpoint-last.pth"
SHIPPED_PRESETS = {"tokenbridge-tiny": "tiny/tokenbridge-64"}  # whose weights come with the package
SHIPPED_LICENCE = "Apache-2.0"
STAND_IN_IMAGES = 2  # as few as prove the path


# ------------------------------------------------------------------------------------------------- the one table


@dataclass(frozen=True)
class PublishedTokenizer:
    """A published autoencoder, which makes images of a model's latents or tokens."""

    key: str  # of its file, in artifacts.py; its name for `convert`
    part: str  # what it is, for messages
    model_class: Any
    create: Callable[[], Any]  # on the meta device
    load: Callable[[Path], Any]


@dataclass(frozen=True)
class Kind:
    """What is particular to a system."""

    name: str  # as in recipes.py
    model_class: Any
    sampler: type[ModelSampler]
    presets: Mapping[str, Preset]
    load: Callable[..., Any]  # from the published file and the preset's name
    has_average: bool  # the file holds the weights' moving average beside the last ones: `load` takes ema=
    flop: Callable[[Mapping[str, Any], Any, Any], FLOP]  # of one image by part, from sizes, settings, autoencoder
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
        if self.has_average:
            return self.load(path, name, ema=ema)
        if not ema:
            raise ValueError(f"The files of {self.name} hold one set of weights, no moving average beside it.")
        return self.load(path, name)


KL16 = PublishedTokenizer(KL16_VAE, "VAE", AutoencoderKL, create_kl16, load_kl16)
VQ16, VQ8 = (
    PublishedTokenizer(name, "VQ tokenizer", LlamaGenVQ, partial(create_vq, name), partial(load_vq, name=name))
    for name in ("llamagen-vq16", "llamagen-vq8")
)
GIVT_VAE = PublishedTokenizer("givt-vae", "VAE", GivtVAE, givt_official.create_givt_vae, givt_official.load_givt_vae)
TOKENIZERS = {tokenizer.key: tokenizer for tokenizer in (KL16, VQ16, VQ8, GIVT_VAE)}

_PRECISION_RECALL = "Precision and recall as published: TokenBridge's table 3 (arXiv 2503.16430 v1)."


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="tokenbridge",
            model_class=TokenBridge,
            sampler=TokenBridgeSampler,
            presets=presets.PRESETS,
            load=official.load_tokenbridge,
            has_average=True,
            flop=tokenbridge_flop,
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
            sampler=MarSampler,
            presets=mar.PRESETS,
            load=mar.load_mar,
            has_average=True,
            flop=mar_flop,
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
            sampler=LlamaGenSampler,
            presets=llamagen.PRESETS,
            load=llamagen.load_llamagen,
            has_average=False,
            flop=llamagen_flop,
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
            sampler=GivtSampler,
            presets=givt_official.PRESETS,
            load=givt_official.load_givt,
            has_average=False,
            flop=givt_flop,
            tokenizer=GIVT_VAE,
            recipe="vae",
            dtype="fp32",
            labels=None,
            has_global_streams=False,
            stand_in={},
            default_size="causal-256",
            published=givt_official.README,
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
        raise ValueError(f"{name!r} may be {' or '.join(preset.name for _, preset in found)}: say which.")
    if not found:
        raise ValueError(f"Unknown preset {name!r}; there are {', '.join(known)}.")
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
            raise ValueError(f"--size goes with a system ({', '.join(KINDS)}), not with the preset {name!r}.")
        kind, preset = find_preset(name)
        if reason := unpublished(preset):
            raise ValueError(f"{preset.name} cannot be reproduced: {reason}.")
        return kind, preset
    kind = KINDS[name]
    wanted = f"{name}-{(size or kind.default_size).lower()}"
    there = [p for p in kind.presets.values() if p.name == wanted or p.name.startswith(f"{wanted}-")]
    usable = [p for p in kind.presets.values() if unpublished(p) is None]
    sizes = ", ".join(p.name.removeprefix(f"{name}-") for p in usable)
    found = [p for p in there if p in usable]
    if len(found) > 1:
        raise ValueError(f"{name} has several of size {size}: {', '.join(p.name for p in found)}. Sizes are {sizes}.")
    if not found:
        reasons = "; ".join(f"of {p.name} {unpublished(p)}" for p in there) or "there is no such size"
        raise ValueError(f"{name} of size {size!r} cannot be reproduced: {reasons}. Sizes are {sizes}.")
    return kind, found[0]


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
        masked = isinstance(self.sampling, MaskedSamplingConfig)
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
            raise ValueError(f"{self.name} has no setting {', '.join(unknown)}; it has {', '.join(known)}.")
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
        if isinstance(self.sampling, MaskedSamplingConfig):
            masked_counts(self.num_positions, self.sampling.num_iterations)
        run_labels(config, self.model["num_classes"])
        if config.randomness == "official" and not self.kind.has_global_streams:
            raise ValueError(
                f"{self.name} has no official randomness here: its official code draws with JAX, whose numbers torch "
                "cannot make. Take per-image randomness."
            )

    def dtype(self, name: str | None, device: torch.device) -> Dtype:
        """Return the precision called `name`; if None the official one on GPUs, and float32 for all else."""
        if name is None:
            return self.kind.dtype if self.is_published and device.type == "cuda" else "fp32"
        if name not in get_args(Dtype):
            raise ValueError(f"Unknown dtype {name!r}; there are {', '.join(get_args(Dtype))}.")
        return cast("Dtype", name)

    def flop_per_image(self) -> FLOP:
        """Count the operations of one image by part."""
        return self.kind.flop(self.model, self.sampling, self.create_decoder())

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
            raise FileNotFoundError(f"Files are missing. {'; '.join(missing)}.")
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
        for module in (model, decoder):
            load_official(module, rule_state(module, {"rule": RULE, "salt": STAND_IN_SALT}))
        return self._sampler(model, decoder, {}, device, dtype, compiled)

    def _check_compiled(self, compiled: bool) -> None:
        if compiled and not issubclass(self.kind.model_class, TokenBridge | MAR):
            raise ValueError(f"{self.name} cannot be compiled: it would be compiled anew for every token.")

    def _sampler(
        self, model: Any, decoder: Any, files: Mapping[str, Path], device: torch.device, dtype: Dtype, compiled: bool
    ) -> ModelSampler:
        # nn.Module's own: diffusers' method warns of a list of modules that is empty here.
        nn.Module.to(model, device, DTYPES[dtype] if self.kind.sampler.casts_weights else torch.float32)
        nn.Module.to(decoder, device, torch.float32)
        if compiled:
            # What nearly all the work is in; the number of visible positions grows, so shapes are dynamic.
            model.backbone.compile(dynamic=True)
            decoder.decoder.compile()
        name = self.name if files else f"{self.name}, stand-in weights, no result"
        return self.kind.sampler(name, model, as_tokenizer(decoder), self.sampling, dtype, files, compiled)


def find_system(
    name: str,
    *,
    shipped: Path,
    preset: str | None = None,
    variant: str | None = None,
    weights: Path | None = None,
    vae: Path | None = None,
) -> System:
    """Return the system called `name`.

    Args:
        name: a preset, SCALE/RECIPE, or the path of a checkpoint or model folder.
        shipped: folder of results, which holds the models of a scale in SCALE/weights.
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
            raise ValueError(f"{name} is a path: say with --preset which model is there ({', '.join(known)}).")
        if weights is not None:
            raise ValueError("Weights are given twice: as the model's path, and with --weights.")
        system = find_system(find_preset(preset)[1].name, shipped=shipped, variant=variant, vae=vae)
        return replace(system, weights=Path(name))
    if preset is not None:
        raise ValueError(f"--preset says which model a path holds, but there is no path {name!r}.")
    if name in known and name not in SHIPPED_PRESETS:
        return _published(*known[name], variant, weights, vae)
    found = _recipe_of(SHIPPED_PRESETS.get(name, name))
    if found is None:
        raise ValueError(f"Unknown model {name!r}; there are {', '.join([*known, *_generators()])}, and paths.")
    scale, recipe = found
    if recipe.sampling is None:
        raise ValueError(f"{name!r} is no generator.")
    if name in SHIPPED_PRESETS:
        sampling = known[name][1].sampling_config(variant)
    elif variant is None:
        sampling = recipe.sampling
    else:
        raise ValueError(f"{name} has no variants.")
    kind, folder = KINDS[recipe.kind], weights or shipped / scale.name / "weights"
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
        return kind.tokenizer.load(weights_file(path, kind.tokenizer.key))

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


def _recipe_of(name: str) -> tuple[recipes.Scale, recipes.Recipe] | None:
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
        model = TOKENIZERS[name].load(weights_file(path, name))
    else:
        kind, preset = find_preset(name)
        model = kind.load_published(weights_file(path, preset.name), preset.name, ema=ema)
    with replacing_folder(folder) as temporary:
        # One file whatever its size: what `load_model` reads.
        model.save_pretrained(temporary, safe_serialization=True, max_shard_size="1TB")


@dataclass(frozen=True)
class Listing:
    """A preset, as `tokenbridge models` shows it."""

    name: str
    system: str
    num_parameters: int
    num_tokens: int  # of an image
    token: str  # what one is
    source: str
    licence: str  # of the weights
    published: Mapping[str, float]  # scores: FID, IS, ...
    settings: Mapping[str, Mapping[str, Any]]  # of the sampler, by variant, each with its source

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def list_presets() -> list[Listing]:
    """Return every preset of every system."""
    return [_listing(kind, preset) for kind, preset in all_presets().values()]


def _listing(kind: Kind, preset: Preset) -> Listing:
    sizes = preset.model
    length = sizes["num_positions"] if "num_positions" in sizes else sizes["latent_size"] ** 2
    num_tokens, token = {
        "tokenbridge": lambda: (length * sizes["num_channels"], f"one of {sizes['num_levels']} levels"),
        "mar": lambda: (length, f"a vector of {sizes['num_channels']}"),
        "givt": lambda: (length, f"a vector of {sizes['num_channels']}"),
        "llamagen": lambda: (length, f"one of {sizes['num_codes']:,} codes"),
    }[kind.name]()
    artifact = ARTIFACTS.get(preset.name)
    if preset.name in SHIPPED_PRESETS:
        source, licence = "shipped with this package", SHIPPED_LICENCE
    else:
        source = artifact.origin if artifact else "not published"
        licence = artifact.licence if artifact else "–"
    settings = {name: {**asdict(recipe.config), "source": recipe.source} for name, recipe in preset.sampling.items()}
    return Listing(
        preset.name, kind.name, preset.num_parameters, num_tokens, token, source, licence, preset.published, settings
    )


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
    system = find_system(model, shipped=reference_folder(), weights=weights, vae=vae).sampled(**settings)
    config = RunConfig(num_images, system.labels if labels is None else labels, seed, batch_size=batch_size)
    system.check(config)
    if system.is_published:
        system = with_artifacts(system)
    device = process_state().device
    sampler = system.load(device, dtype=system.dtype(None, device))
    return sampling_run(sampler, config, out, show_progress=show_progress)
