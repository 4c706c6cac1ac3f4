"""Sampling with a model by name: `tokenbridge sample` and the tables call these functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tokenbridge.models.system import read_settings
from tokenbridge.sampling.config import Format, Randomness, RunConfig
from tokenbridge.sampling.load import STAND_IN_IMAGES, ModelSampler, NamedModel, find_model
from tokenbridge.sampling.plan import Plan, plan_run
from tokenbridge.sampling.run import BadImageError, RunReport, sampling_run, save_overview
from tokenbridge.utils.console import track
from tokenbridge.utils.devices import Dtype
from tokenbridge.utils.errors import UnusableImageError, UserError
from tokenbridge.utils.files import check_folder
from tokenbridge.utils.processes import locked_by_launch, process_state
from tokenbridge.weights.artifacts import Artifact, how_to_fetch

MODEL = "tokenbridge-tiny"
NUM_IMAGES = 100


@dataclass(frozen=True)
class Sampled:
    """The result of a sampling run, and the sampler that made it."""

    sampler: ModelSampler
    report: RunReport
    folder: Path
    overview: Path  # picture of the first images


def sample(
    model: str = MODEL,
    *,
    out: Path | str | None = None,
    dtype: Dtype | None = None,
    compiled: bool = False,
    stand_in: bool = False,
    overwrite: bool = False,
    accept_other_code: bool = False,
    show_progress: bool = True,
    **wishes: Any,
) -> RunReport:
    """Generate images with a model by name; a run that was killed makes only the images that are still missing.

    Args:
        model: the name or the path of a model, as `choose_run` takes it.
        out: folder of the run, `runs/MODEL-samples` by default. Images go to `out/images`, and an overview to
            `out/grid.png`.
        dtype: fp32, bf16 or fp16; None means the precision of the published evaluation on a GPU, otherwise float32.
        compiled: compile the backbone and the decoder of the VAE.
        stand_in: use weights that are drawn by a rule, and sample few images in few iterations; they are not a result.
        overwrite: remove the images of an earlier run in `out` first.
        accept_other_code: go on with a run that other code or libraries began; its `run.json` then says so.
        show_progress: show the progress on stderr.
        wishes: all other arguments of `choose_run`, such as `num_images` and `guidance_scale`.

    Raises:
        MissingArtifactsError: files are missing and cannot be downloaded. The message lists all of them.
        UserError: the model or a setting is unknown, a value is out of range, or `out` holds another run.
        UnusableImageError: an image is NaN or black; the finished images are kept.
        StorageError: the disk is full or cannot be written to; the finished images are kept.
    """
    named, config = choose_run(model, stand_in=stand_in, **wishes)
    done = sample_model(
        named,
        config,
        out,
        dtype=dtype,
        compiled=compiled,
        stand_in=stand_in,
        overwrite=overwrite,
        accept_other_code=accept_other_code,
        show_progress=show_progress,
    )
    return done.report


def choose_run(
    model: str = MODEL,
    /,
    *,
    preset: str | None = None,
    variant: str | None = None,
    weights: Path | None = None,
    vae: Path | None = None,
    num_images: int | None = None,
    label: int | None = None,
    labels: Sequence[int] | Literal["balanced", "random"] | None = None,
    seed: int = 0,
    randomness: Randomness = "per-image",
    batch_size: int = 16,
    format: Format = "png",  # noqa: A002  as the option and the field are called
    stand_in: bool = False,
    **settings: Any,
) -> tuple[NamedModel, RunConfig]:
    """Return a model by name with its settings, and a run of it; both are checked, and nothing is loaded.

    Args:
        model: a preset (`tokenbridge-l`), a recipe of a scale (`tiny/parallel-64`), or the path of a model.
        preset: name of the preset that the path holds.
        variant: name of the preset's sampling settings; None means the official ones.
        weights: the generator's file or folder; None means the usual places, or a download.
        vae: the tokenizer's file or folder; None means the usual places, or a download.
        num_images: number of images of the whole run; None means one for each of `labels`, or 100, or 2 of a stand-in.
        label: one label for all images.
        labels: a label for each image, "balanced" or "random"; None means as in the model's published evaluation.
        seed: non-negative number; with per-image randomness, an image is a function of seed, number and label.
        randomness: one stream for each image ("per-image"), or the global streams of the official code ("official").
        batch_size: number of images at a time in each process.
        format: "png" for a folder of PNG files, or "npz" for one file.
        stand_in: choose settings that make a stand-in quick.
        settings: sampling settings such as `guidance_scale` that replace the model's own.

    Raises:
        UserError: the model or a setting is unknown, or a value is out of range.
    """
    named = find_model(model, preset=preset, variant=variant, weights=weights, vae=vae)
    if stand_in:
        named = named.for_stand_in()
    named = replace(named, settings=read_settings(named.name, named.settings, settings))
    if label is not None and labels is not None:
        raise UserError("--label gives one class for all images, --labels one for each: name one of them.")
    each = None if labels is None or isinstance(labels, str) else tuple(labels)
    if num_images is None:
        num_images = len(each) if each is not None else STAND_IN_IMAGES if stand_in else NUM_IMAGES
    if label is not None:
        each = (label,) * num_images
    drawn = named.labels if labels is None else "random" if labels == "random" else None
    config = RunConfig(num_images, drawn if each is None else each, seed, randomness, batch_size, format)
    named.check(config)
    return named, config


def plan_sampling(
    model: NamedModel,
    config: RunConfig,
    out: Path | str | None = None,
    *,
    dtype: Dtype | None = None,
    stand_in: bool = False,
    missing: Sequence[Artifact] | None = None,
    folder: Path | None = None,
) -> Plan:
    """Estimate what `sample_model` would take with the same arguments; nothing is loaded or written.

    Args:
        model: the model before loading.
        config: the configuration of the run.
        out: the folder of the run.
        dtype: the precision of the run.
        stand_in: whether the weights are drawn by a rule.
        missing: the published files that the run lacks. None means those of the model and its tokenizer.
        folder: the folder of the published files, for the command that fetches them.
    """
    state = process_state()
    named = [] if stand_in else [path for path in (model.weights, model.vae) if path is not None]
    if missing is None:
        missing = [] if stand_in else model.missing_artifacts()
    return plan_run(
        model,
        config,
        run_folder(model, out, stand_in=stand_in),
        device=state.device,
        dtype=model.dtype(dtype, state.device),
        num_processes=state.num_processes,
        missing=[
            *(f"{artifact.key}: {artifact.origin}" for artifact in missing),
            *(f"there is no {path}" for path in named if not path.exists()),
        ],
        next_commands=how_to_fetch([artifact.key for artifact in missing], folder),
    )


def run_folder(model: NamedModel, out: Path | str | None = None, *, stand_in: bool = False) -> Path:
    """Return the folder of a run, `runs/MODEL-samples` or `runs/MODEL-stand-in` by default."""
    if out is not None:
        return Path(out)
    return Path("runs") / f"{model.name.replace('/', '-')}-{'stand-in' if stand_in else 'samples'}"


def sample_model(
    model: NamedModel,
    config: RunConfig,
    out: Path | str | None = None,
    *,
    overview: Path | None = None,
    dtype: Dtype | None = None,
    compiled: bool = False,
    stand_in: bool = False,
    overwrite: bool = False,
    accept_other_code: bool = False,
    show_progress: bool = True,
) -> Sampled:
    """Check a run, load its model and make its images; every process of a distributed run calls this function.

    It raises the errors of `sample`.

    Args:
        model: the model before loading. Files that the user did not name are looked for and otherwise downloaded.
        config: number of images, labels and random numbers of the run.
        out: folder of the run; None means `run_folder`.
        overview: path of the picture of the first images; None means `grid.png` in the folder.
        dtype: fp32, bf16 or fp16; None means the precision of the published evaluation on a GPU, otherwise float32.
        compiled: compile the backbone and the decoder of the VAE.
        stand_in: use weights that are drawn by a rule; the images are then not a result.
        overwrite: see `sample`.
        accept_other_code: see `sample`.
        show_progress: show the progress on stderr.
    """
    model.check(config)
    state, folder = process_state(), run_folder(model, out, stand_in=stand_in)
    precision = model.dtype(dtype, state.device)
    check_folder(folder)  # before gigabytes are downloaded and loaded
    if stand_in:
        sampler = model.stand_in(state.device, dtype=precision, compiled=compiled)
    else:
        with state.main_process_first():  # one process downloads the files, and the others find them
            model = model.with_artifacts()
        sampler = model.load(state.device, dtype=precision, compiled=compiled)
    overview = overview or folder / "grid.png"
    with locked_by_launch(folder):
        report = sampling_run(
            sampler,
            config,
            folder,
            overwrite=overwrite,
            accept_other_code=accept_other_code,
            show_progress=show_progress,
        )
        if state.is_main_process:
            save_overview(overview, report.samples, f"{sampler.name}, seed {config.seed}, {report.num_images} images")
    return Sampled(sampler, report, folder, overview)


def sample_pixels(
    sampler: ModelSampler, labels: Tensor, seed: int, *, batch_size: int = 250, show_progress: bool = True
) -> Tensor:
    """Return one image for each of the labels [N], as uint8 pixels [N, C, H, W] on the CPU, without writing files.

    Raises:
        UnusableImageError: an image is NaN.
    """
    pixels = []
    for indices in image_batches(len(labels), batch_size, show_progress=show_progress):
        try:
            pixels.append(sampler.images(labels[indices], indices, seed))
        except BadImageError as error:
            index = indices[error.row]
            raise UnusableImageError(
                f"Image {index} (seed {seed}, class {int(labels[index])}) of {sampler.name} {error}."
            ) from error
    return torch.cat(pixels)


def image_batches(num_images: int, batch_size: int, *, show_progress: bool) -> Iterator[list[int]]:
    """Yield the indices of each batch of images, and show a progress bar on stderr."""
    if num_images < 1:
        raise UserError("The number of images must be at least 1.")
    starts = range(0, num_images, batch_size)
    for start in track(starts, "sample", show=show_progress):
        yield list(range(start, min(start + batch_size, num_images)))
