"""Sampling with a model by name: `tokenbridge sample` and the tables call these functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tokenbridge.sampling.config import Format, Randomness, RunConfig
from tokenbridge.sampling.load import ModelSampler, NamedModel, find_model
from tokenbridge.sampling.run import RunReport, sampling_run, save_overview
from tokenbridge.utils.console import track
from tokenbridge.utils.devices import process_state
from tokenbridge.utils.errors import UserError

NUM_IMAGES = 100


@dataclass(frozen=True)
class Sampled:
    """The result of a sampling run, and the sampler that made it."""

    sampler: ModelSampler
    report: RunReport
    overview: Path  # picture of the first images


def sample(
    model: str = "tokenbridge-tiny",
    *,
    out: Path | str,
    num_images: int = NUM_IMAGES,
    labels: tuple[int, ...] | Literal["random"] | None = None,
    seed: int = 0,
    randomness: Randomness = "per-image",
    batch_size: int = 16,
    dtype: str | None = None,
    compiled: bool = False,
    format: Format = "png",  # noqa: A002  as the option and the field are called
    weights: Path | None = None,
    vae: Path | None = None,
    show_progress: bool = True,
    **settings: Any,
) -> RunReport:
    """Generate images with a model by name; a run that was killed makes only the images that are still missing.

    Args:
        model: a preset (`tokenbridge-l`) or a recipe of a scale (`tiny/parallel-64`).
        out: folder of the run; images go to `out/images`, and an overview to `out/grid.png`.
        num_images: number of images of the whole run.
        labels: a label for each image, or "random"; None means those of the model's published evaluation.
        seed: non-negative number; with per-image randomness, an image is a function of seed, number and label.
        randomness: one stream for each image ("per-image"), or the global streams of the official code ("official").
        batch_size: number of images at a time in each process.
        dtype: fp32, bf16 or fp16; None means the precision of the published evaluation on a GPU, otherwise float32.
        compiled: compile the backbone and the decoder of the VAE.
        format: "png" for a folder of PNG files, or "npz" for one file.
        weights: the generator's file or folder; None means the usual places, or a download.
        vae: the tokenizer's file or folder; None means the usual places, or a download.
        show_progress: show the progress on stderr.
        settings: sampling settings such as `guidance_scale` that replace the model's own.

    Raises:
        MissingArtifactsError: files are missing and cannot be downloaded; the message lists all of them.
        UserError: the model or a setting is unknown, a value is out of range, or `out` holds another run.
        UnusableImageError: an image is NaN or black; the finished images are kept.
        StorageError: the disk is full or cannot be written to; the finished images are kept.
    """
    named = find_model(model, weights=weights, vae=vae).sampled(**settings)
    config = RunConfig(num_images, named.labels if labels is None else labels, seed, randomness, batch_size, format)
    done = sample_model(named, config, out, dtype=dtype, compiled=compiled, show_progress=show_progress)
    return done.report


def sample_model(
    model: NamedModel,
    config: RunConfig,
    out: Path | str,
    *,
    overview: Path | None = None,
    dtype: str | None = None,
    compiled: bool = False,
    stand_in: bool = False,
    show_progress: bool = True,
) -> Sampled:
    """Check a run, load its model and make its images; every process of a distributed run calls this function.

    It raises the errors of `sample`.

    Args:
        model: the model before loading. Files that the user did not name are looked for and otherwise downloaded.
        out: folder of the run.
        overview: path of the picture of the first images; None means `grid.png` in `out`.
        dtype: fp32, bf16 or fp16; None means the precision of the published evaluation on a GPU, otherwise float32.
        compiled: compile the backbone and the decoder of the VAE.
        stand_in: use weights that are drawn by a rule; the images are then not a result.
    """
    model.check(config)
    state = process_state()
    precision = model.dtype(dtype, state.device)
    if stand_in:
        sampler = model.stand_in(state.device, dtype=precision, compiled=compiled)
    else:
        with state.main_process_first():  # one process downloads the files, and the others find them
            model = model.with_artifacts()
        sampler = model.load(state.device, dtype=precision, compiled=compiled)
    report = sampling_run(sampler, config, out, show_progress=show_progress)
    overview = overview or Path(out) / "grid.png"
    if state.is_main_process:
        save_overview(overview, report.samples, f"{sampler.name}, seed {config.seed}, {report.num_images} images")
    return Sampled(sampler, report, overview)


def sample_pixels(
    sampler: ModelSampler, labels: Tensor, seed: int, *, batch_size: int = 250, show_progress: bool = True
) -> Tensor:
    """Return one image for each of the labels [N], as uint8 pixels [N, C, H, W] on the CPU, without writing files."""
    batches = image_batches(len(labels), batch_size, show_progress=show_progress)
    return torch.cat([sampler.images(labels[indices], indices, seed) for indices in batches])


def image_batches(num_images: int, batch_size: int, *, show_progress: bool) -> Iterator[list[int]]:
    """Yield the indices of each batch of images, and show a progress bar on stderr."""
    if num_images < 1:
        raise UserError("The number of images must be at least 1.")
    starts = range(0, num_images, batch_size)
    for start in track(starts, "sample", show=show_progress):
        yield list(range(start, min(start + batch_size, num_images)))
