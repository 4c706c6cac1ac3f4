"""Reconstruction of images by a tokenizer: the command `tokenbridge reconstruct`, and the functions that table 1 uses.

A diffusers autoencoder encodes and decodes the images with continuous latents, and then once more with its latents
quantised to each number of levels (a VQ model does so once). The table, the distortions and a grid of pictures are
written to one folder.

Shape letters: N images, B batch, C channels, H height, W width, h, w latent height and width.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import huggingface_hub
import torch
from torch import Tensor

from tokenbridge.data.images import images_to_pixels, pixels_to_images
from tokenbridge.data.pictures import save_grid
from tokenbridge.data.sources import load_images, pixels_of
from tokenbridge.evaluation import metrics
from tokenbridge.evaluation.features import forward
from tokenbridge.evaluation.inception import Inception, find_inception, load_inception
from tokenbridge.results.markdown import cell, escape, markdown_table
from tokenbridge.results.schema import Row
from tokenbridge.results.score import Score, to_metrics
from tokenbridge.tokenizers.base import LatentTokenizer, Tokenizer, VQTokenizer
from tokenbridge.tokenizers.distortion import Distortion, measure_distortion
from tokenbridge.tokenizers.quantizer import (
    GAUSSIAN_RANGE,
    ScalarQuantizer,
    gaussian_quantizer,
    lloyd_max_quantizer,
    uniform_quantizer,
)
from tokenbridge.utils import provenance
from tokenbridge.utils.devices import best_device
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import check_replaceable, write_json, write_text
from tokenbridge.utils.locks import results_folder
from tokenbridge.weights.artifacts import MissingArtifactsError
from tokenbridge.weights.diffusers import WEIGHTS_FILE, load_model, read_config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenbridge.evaluation.classifier import Classifier

FILES = ("reconstruction.json", "reconstruction.md", "reconstruction.png")
SCHEMA = "tokenbridge-reconstruction/1"
QUANTIZERS = ("gaussian", "uniform", "lloyd-max")
COLUMNS = ("PSNR", "SSIM", "rFID", "bits per image")
STD_RANGE = (0.5, 2.0)  # the codebooks suit latents of unit variance; outside this range they fit badly
NUM_SHOWN = 8  # images in the grid
MAX_LEVELS = 2**16  # the most levels of a quantiser, far more than the precision of latents warrants
PIPELINE_PARTS = ("vae", "vqvae", "movq")  # names of the autoencoder's folder in pipelines
PROBE_SIZE = 64  # pixels; a multiple of every down-sampling factor in use


@dataclass(frozen=True)
class Report:
    """The measurements of `reconstruct`, and what a reader must know to judge them."""

    settings: dict[str, Any]
    rows: list[Row]
    distortions: dict[str, Distortion]  # distortions of the scaled latents, by the row's id
    notes: list[str]


def reconstruct(
    source: str,
    *,
    tokenizer: str,
    out: Path | str,
    levels: Sequence[int] = (8, 16, 32, 64),
    quantizer: str = "gaussian",
    value_range: float = GAUSSIAN_RANGE,
    scale: str | float = "config",
    split: str = "test",
    image_size: int | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    inception_weights: Path | str | None = None,
    seed: int = 0,
) -> Report:
    """Reconstruct images, and write reconstruction.md, reconstruction.json and reconstruction.png into `out`.

    This runs on the GPU if there is one. Without Inception's weights rFID is left out, and a note says so.

    Args:
        source: a folder, a Parquet file or the name of a data set, as `load_images` takes it.
        tokenizer: a folder or a name on the hub, as `load_tokenizer_model` takes it.
        out: the folder for table, numbers and pictures.
        levels: numbers of levels to quantise to. A VQ model ignores these and the next three arguments.
        quantizer: "gaussian" (the paper's), "uniform", or "lloyd-max", which is fitted to the latents of these images.
        value_range: the range of the Gaussian and the uniform codebook, in scaled latent units.
        scale: "config" keeps the autoencoder's own `scaling_factor`, "measure" scales the latents of these images to
            mean 0 and standard deviation 1, and a number replaces `scaling_factor`.
        split: the split of the source.
        image_size: pixels of the centre crop, which is needed where the images differ in size.
        limit: the most images that are used. They are drawn by `seed`.
        batch_size: images per forward pass.
        inception_weights: the published file. None looks in the usual places (artifacts.py) without a download.
        seed: the seed of the draw.

    Raises:
        MissingArtifactsError: `inception_weights` is given, but there is no such file.
        UserError: the images or the tokenizer cannot be loaded, a setting is unknown, or the size of the images is
            not a multiple of the autoencoder's down-sampling factor.
    """
    if quantizer not in QUANTIZERS:
        raise UserError(f"Unknown quantiser {quantizer!r}; there are {', '.join(QUANTIZERS)}.")
    if max(levels) > MAX_LEVELS:
        raise UserError(f"A quantiser can have at most {MAX_LEVELS:,} levels here, not {max(levels):,}.")
    check_replaceable(out, FILES)  # before the work whose results it is to hold
    inception, notes = _find_inception(inception_weights)  # before the work, so that a bad file does not cost hours
    model = load_tokenizer_model(tokenizer).to(best_device())
    pixels = _load_pixels(source, split, image_size, limit, seed, channels=getattr(model.config, "in_channels", 3))
    _check_size(model, pixels)

    tokenizers: dict[str, Tokenizer] = {}
    distortions: dict[str, Distortion] = {}
    if isinstance(model, diffusers.VQModel):
        vq = VQTokenizer(model)
        tokenizers[f"VQ, {vq.num_codes} codes"] = vq
    else:
        _set_scale(model, scale, pixels, batch_size)
        latents = _latents(model, pixels, batch_size)
        notes += _judge_latents(latents, quantizer)
        tokenizers["continuous"] = LatentTokenizer(model)
        for num_levels in levels:
            label = f"{quantizer}, {num_levels} levels"
            chosen = _make_quantizer(quantizer, num_levels, value_range, latents)
            distortions[_row_id(label)] = measure_distortion(chosen, latents)
            tokenizers[label] = LatentTokenizer(model, chosen.to(model.device))

    shown = torch.linspace(0, len(pixels) - 1, min(NUM_SHOWN, len(pixels))).long()  # sources are often sorted by class
    rows, pictures = [], {"original": pixels[shown]}
    for label, chosen_tokenizer in tokenizers.items():
        reconstructions, bits = reconstruct_with(chosen_tokenizer, pixels, batch_size)
        scores = reconstruction_scores(pixels, reconstructions, bits=bits)
        if inception is not None and len(pixels) > 1:
            scores.append(inception_rfid(pixels, reconstructions, inception, batch_size))
        rows.append(Row(id=_row_id(label), label=label, metrics=to_metrics(scores)))
        pictures[label] = reconstructions[shown]
    if inception is not None:
        notes.append(_judge_number(len(pixels)))

    settings = {
        "source": source,
        "split": split,
        "images": len(pixels),
        "image shape": list(pixels.shape[1:]),
        "images sha256": _sha256(pixels),
        "tokenizer": tokenizer,
        "class": type(model).__name__,
        "weights sha256": _sha256(*model.state_dict().values()),
        "seed": seed,
    }
    if distortions:
        settings |= {"quantizer": quantizer, "value range": value_range, "scale": scale}
        settings |= {"scaling factor": model.config.scaling_factor, "shift factor": model.config.shift_factor}
    report = Report(settings, rows, distortions, notes)
    _write(report, Path(out), pictures)
    return report


def load_tokenizer_model(name: str) -> Any:
    """Load a diffusers autoencoder, float32, in evaluation mode. Its config.json names the class.

    Args:
        name: a folder in diffusers' format, a pipeline's folder that holds one called `vae`, `vqvae` or `movq`, or
            the name of either on the hub. Weights are read from safetensors only, because other formats can run code.

    Raises:
        UserError: there is no such folder, it does not hold an autoencoder, or some of the weights are missing.
    """
    root = Path(name) if Path(name).is_dir() else _download(name)
    folder = next((f for f in (root, *(root / p for p in PIPELINE_PARTS)) if (f / "config.json").is_file()), None)
    if folder is None:
        raise UserError(f"There is no config.json in {name!r}, nor in {', '.join(PIPELINE_PARTS)} under it.")
    class_name = read_config(folder)["_class_name"]
    model_class: Any = getattr(diffusers, class_name, None)
    if not (hasattr(model_class, "encode") and hasattr(model_class, "decode")):
        raise UserError(f"{name!r} holds a {class_name}, not an autoencoder of diffusers.")
    try:
        return load_model(model_class, folder)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def reconstruct_with(tokenizer: Tokenizer, images: Tensor, batch_size: int = 64) -> tuple[Tensor, float | None]:
    """Encode and decode images in batches, on the tokenizer's device.

    Args:
        tokenizer: a `LatentTokenizer`, with or without a quantiser, or a `VQTokenizer`.
        images: uint8 [N, C, H, W].
        batch_size: images per forward pass.

    Returns:
        The reconstructions, uint8 [N, C, H, W] on the CPU, and the size of one image's tokens in bits, which is None
        where the latents stay continuous.
    """
    parts, bits = [], None
    continuous = isinstance(tokenizer, LatentTokenizer) and tokenizer.quantizer is None
    for batch in images.split(batch_size):
        batch_images = pixels_to_images(batch.to(tokenizer.device))
        if continuous:
            decoded = tokenizer.reconstruct(batch_images)
        else:
            tokens = tokenizer.encode(batch_images)
            decoded, bits = tokenizer.decode(tokens), tokenizer.bits_per_image(tokens)
        parts.append(images_to_pixels(decoded).cpu())
    return torch.cat(parts), bits


def reconstruction_scores(
    images: Tensor,
    reconstructions: Tensor,
    *,
    classifier: Classifier | None = None,
    extractor: str = "digits",
    bits: float | None = None,
) -> list[Score]:
    """Return PSNR (dB) and SSIM, each the mean over images, and the scores of the optional arguments. All are finite.

    The PSNR of an image that is reconstructed exactly is infinite. It counts here as if one value were off by one,
    which is the smallest possible error, because leaving the image out would lower the mean of the better tokenizer.

    Args:
        images: uint8 [N, C, H, W].
        reconstructions: uint8 [N, C, H, W].
        classifier: a feature extractor. With one, rFID (the Fréchet distance of reconstructions and images in its
            features) and the IS of the reconstructions are added.
        extractor: the classifier's name.
        bits: the size of one image's tokens. If it is given, `bits per image` is added.
    """
    highest = 10 * math.log10(255**2 * images[0].numel())
    scores = [
        Score("PSNR", metrics.psnr(images, reconstructions).clamp(max=highest).mean().item()),
        Score("SSIM", metrics.ssim(images, reconstructions).mean().item()),
    ]
    if classifier is not None:
        features, logits = metrics.extract_features(reconstructions, classifier)
        originals, _ = metrics.extract_features(images, classifier)
        scores += [
            _rfid(features, originals, extractor),
            Score("IS", metrics.inception_score(logits, 0)[0], extractor),
        ]
    return scores if bits is None else [*scores, Score("bits per image", bits)]


def inception_rfid(images: Tensor, reconstructions: Tensor, inception: Inception, batch_size: int = 32) -> Score:
    """Return the FID of reconstructions and images, on the GPU if there is one.

    Args:
        images: uint8 [N, C, H, W], C 1 (repeated to 3) or 3, N >= 2, which Inception resizes as TensorFlow 1 did.
        reconstructions: uint8 [N, C, H, W].
        inception: torch-fidelity's Inception.
        batch_size: images per forward pass.
    """

    def features(pixels: Tensor) -> Tensor:
        batches = forward(pixels.expand(-1, 3, -1, -1), inception.network, batch_size, "rFID")
        return torch.cat([outputs[0] for _, outputs in batches])

    return _rfid(features(reconstructions), features(images), inception.extractor)


def _rfid(reconstructions: Tensor, images: Tensor, extractor: str | None) -> Score:
    """Return the Fréchet distance of two sets of features [N, F]."""
    distance = metrics.frechet_distance(metrics.statistics_of(reconstructions), metrics.statistics_of(images))
    return Score("rFID", distance, extractor)


def _download(name: str) -> Path:
    """Return the hub client's copy of an autoencoder, or of the parts of a pipeline that may be one."""
    files = ("config.json", WEIGHTS_FILE)
    try:
        parts = [f"{part}/{file}" for part in PIPELINE_PARTS for file in files]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*files, *parts]))
    except Exception as error:  # as for data sets, a dozen unrelated types
        raise UserError(
            f"There is no tokenizer {name!r}: no such folder here, and not to be had from the hub "
            f"({type(error).__name__}). Download its config.json and {WEIGHTS_FILE} elsewhere into a folder and name "
            "that, or make the hub reachable."
        ) from error


def _find_inception(path: Path | str | None) -> tuple[Inception | None, list[str]]:
    """Return the network and no note, or None and the reason; a file that was asked for by name must be there."""
    try:
        return load_inception(find_inception(path, download=False)), []
    except MissingArtifactsError as error:
        if path is not None:
            raise
        return None, [f"rFID not run: {error.missing[0]}"]


def _load_pixels(
    source: str, split: str, image_size: int | None, limit: int | None, seed: int, *, channels: int
) -> Tensor:
    """Load images as uint8 [N, C, H, W]; `limit` of them are drawn, since the first may all be of one class."""
    if channels not in (1, 3):
        raise UserError(f"The tokenizer takes images of {channels} channels, but only 1 or 3 channels can be loaded.")
    dataset = load_images(source, split)
    if limit is not None:
        if limit < 1:
            raise UserError(f"The limit must be at least 1 image, not {limit}.")
        drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:limit]
        dataset = dataset.select(drawn.sort().values.tolist())
    return pixels_of(dataset, size=image_size, channels=channels)


def _check_size(model: Any, pixels: Tensor) -> None:
    """Refuse images that the autoencoder would reconstruct in another size."""
    probe = torch.zeros(1, pixels.shape[1], PROBE_SIZE, PROBE_SIZE, device=model.device)
    factor = PROBE_SIZE // LatentTokenizer(model).latents(probe).shape[-1]
    height, width = pixels.shape[2:]
    if height % factor or width % factor:
        fitting = max(factor, min(height, width) // factor * factor)
        raise UserError(
            f"The images are {height} x {width} pixels, but this {type(model).__name__} takes multiples of {factor}: "
            f"crop them with an image size of, for example, {fitting}."
        )


def _latents(model: Any, pixels: Tensor, batch_size: int) -> Tensor:
    """Return the scaled latents [N, C, h, w] of images, on the CPU."""
    tokenizer = LatentTokenizer(model)
    batches = (pixels_to_images(batch.to(model.device)) for batch in pixels.split(batch_size))
    return torch.cat([tokenizer.latents(batch).cpu() for batch in batches])


def _set_scale(model: Any, scale: str | float, pixels: Tensor, batch_size: int) -> None:
    """Write the chosen scale into the autoencoder's configuration, where `LatentTokenizer` reads it."""
    own = LatentTokenizer(model)
    factor, shift = own.scale, own.shift
    if scale == "measure":
        raw = _latents(model, pixels, batch_size).double() / factor + shift
        factor, shift = 1 / raw.std(correction=0).item(), raw.mean().item()
    elif scale != "config":
        if isinstance(scale, str) or not (math.isfinite(scale) and scale > 0):
            raise UserError(f"The scale must be 'config', 'measure' or a positive number, not {scale!r}.")
        factor = float(scale)
    model.register_to_config(scaling_factor=factor, shift_factor=shift)


def _make_quantizer(kind: str, num_levels: int, value_range: float, latents: Tensor) -> ScalarQuantizer:
    if kind == "lloyd-max":
        return lloyd_max_quantizer(latents, num_levels)
    make = gaussian_quantizer if kind == "gaussian" else uniform_quantizer
    return make(num_levels, value_range=value_range)


def _judge_latents(latents: Tensor, quantizer: str) -> list[str]:
    """Describe the latents; warn where a codebook made for unit variance does not fit them."""
    mean = round(latents.double().mean().item(), 4) + 0.0  # adding 0 turns -0 into 0
    std = latents.double().std(correction=0).item()
    said = f"Scaled latents {list(latents.shape[1:])}: mean {mean:.3g}, standard deviation {std:.3g}."
    if quantizer == "lloyd-max":
        return [said, "The Lloyd-Max codebooks are fitted to the latents of these same images."]
    if STD_RANGE[0] <= std <= STD_RANGE[1]:
        return [said]
    return [
        said,
        f"WARNING: the quantiser expects a standard deviation near 1, so its levels do not fit these latents and the "
        f"rows say little about the tokenizer. Use scale 'measure', or the factor {1 / std:.3g} times this one.",
    ]


def _judge_number(num_images: int) -> str:
    if num_images < 2:
        return "rFID not run: it needs at least 2 images."
    return f"rFID is of {num_images:,} images. It falls as their number grows, and published values are of 50,000."


def _row_id(label: str) -> str:
    return "reconstruction/" + label.replace(",", "").replace(" ", "-").lower()


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write(report: Report, out: Path, pictures: dict[str, Tensor]) -> None:
    settings = report.settings
    num_shown = len(pictures["original"])
    title = f"{settings['class']}: {num_shown} of {settings['images']} images, {Path(settings['source']).name}"
    inches = min(1.6, max(0.6, settings["image shape"][-1] / 150))  # 150 dots an inch: up to 240 pixels, dot for pixel
    value = {
        "schema_version": SCHEMA,
        "settings": settings,
        "rows": [row.model_dump() for row in report.rows],
        "distortions": {id_: dataclasses.asdict(distortion) for id_, distortion in report.distortions.items()},
        "notes": report.notes,
        "provenance": {
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **provenance.origin(),
        },
    }
    with results_folder(out, FILES) as fresh:
        save_grid(fresh / "reconstruction.png", list(pictures.values()), list(pictures), title, cell_inches=inches)
        write_json(fresh / "reconstruction.json", value)
        write_text(fresh / "reconstruction.md", to_markdown(report))


def to_markdown(report: Report) -> str:
    """Return a report as a Markdown page with the settings, the table, the notes and the latents' distortion."""
    lines = ["# Reconstruction", ""]
    lines += [f"- {name}: {escape(str(value))}" for name, value in report.settings.items()]
    body = [[escape(row.label), *[cell(row, name) for name in COLUMNS]] for row in report.rows]
    lines += ["", *markdown_table(["", *COLUMNS], body), ""]
    lines += [f"- {escape(note)}" for note in report.notes]
    if report.distortions:
        labels = {row.id: escape(row.label) for row in report.rows}
        header = ["", "SNR (dB)", "bits per dimension", "entropy (bits)", "relative MSE", "Lloyd-Max", "Gaussian bound"]
        body = [
            [
                labels[id_],
                f"{d.snr_db:.2f}",
                f"{d.bits_per_dimension:.2f}",
                f"{d.entropy_bits:.2f}",
                *[f"{mse:.6f}" for mse in (d.relative_mse, d.lloyd_max_relative_mse, d.rate_distortion_relative_mse)],
            ]
            for id_, d in report.distortions.items()
        ]
        lines += ["", "## Quantisation of the latents", "", *markdown_table(header, body), ""]
        lines += [
            "Squared errors are relative to the latents' variance. Lloyd-Max is the error of the best scalar levels "
            "for these latents. The Gaussian bound is 2^(-2R), which no code of R bits per dimension beats on Gaussian "
            "latents."
        ]
    return "\n".join(lines)
