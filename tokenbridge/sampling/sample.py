"""Images of a model by name, into a folder: what `tokenbridge sample` does and every table starts from."""

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
    """What a sampling run left, and the sampler that made it."""

    sampler: ModelSampler
    report: RunReport
    overview: Path  # a picture of the first images


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
    """Generate images with a model by name; a run that was killed goes on where it was.

    Args:
        model: a preset (`tokenbridge-l`) or a recipe of a scale (`tiny/parallel-64`).
        out: folder of the run; images go to `out/images`, an overview to `out/grid.png`.
        num_images: how many.
        labels: a class for each image, or random ones; None takes those of the model's own evaluation.
        seed: an image is a function of seed, number and label.
        randomness: of each image, or the official code's global streams.
        batch_size: images at a time.
        dtype: fp32, bf16 or fp16; by default as published on a GPU, and otherwise float32.
        compiled: compile the backbone and the VAE's decoder.
        format: a folder of PNG files, or one .npz.
        weights: the generator's file; the usual places by default.
        vae: the tokenizer's file.
        show_progress: on stderr.
        settings: of sampling, as `guidance_scale`; the model's own by default.

    Raises:
        MissingArtifactsError: files cannot be had; the message lists all of them.
        UserError: an unknown model or setting, or one out of range.
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
    """Check a run, load its model and make its images; every process of a distributed run calls this.

    Args:
        model: not loaded yet; files that nobody named are looked for, and downloaded.
        config: of the run.
        out: folder of the run.
        overview: picture of the first images; `grid.png` in `out` by default.
        dtype: as for `sample`.
        compiled: as for `sample`.
        stand_in: take weights drawn by a rule: the images are no result.
        show_progress: on stderr.

    Raises:
        UserError: as `sample` and `run.sampling_run`.
    """
    model.check(config)
    state = process_state()
    precision = model.dtype(dtype, state.device)
    if stand_in:
        sampler = model.stand_in(state.device, dtype=precision, compiled=compiled)
    else:
        with state.main_process_first():  # one process downloads, the others find
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
    """Return uint8 pixels [N, C, H, W] on the CPU of one image for each label [N], without writing them.

    Raises:
        UserError: there are no labels, or labels without a class; a negative seed.
    """
    batches = image_batches(len(labels), batch_size, show_progress=show_progress)
    return torch.cat([sampler.images(labels[indices], indices, seed) for indices in batches])


def image_batches(num_images: int, batch_size: int, *, show_progress: bool) -> Iterator[list[int]]:
    """Yield the indices of each batch of images, with a progress bar on stderr.

    Raises:
        ValueError: there are no images.
    """
    if num_images < 1:
        raise UserError("The number of images must be at least 1.")
    starts = range(0, num_images, batch_size)
    for start in track(starts, "sample", show=show_progress):
        yield list(range(start, min(start + batch_size, num_images)))
