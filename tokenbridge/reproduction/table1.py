"""Table 1 at the paper's scale: `tokenbridge reproduce table1`, `nox -s reproduce_table1`.

The table shows what quantisation after training costs the VAE's reconstructions: rFID and Inception Score by number of
levels (1a) and by range (1b). The measurement follows reconstruction.py of YuqingWang1029/TokenBridge at 3ede281. It
takes the first 50 training images of each class by file name, centre-crops them as ADM does, and samples latents from
the posterior in float32. rFID is against the statistics of ADM's whole training set.

There are two differences. An image has one posterior sample for all rows, drawn from (seed, index), whereas the
official script draws anew for every row, without a seed. And the hub's Parquet files hold ImageNet in another order,
so the first 50 images of a class are not the same.

Shape letters: N images, B batch, C latent channels, h, w latent height and width.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenbridge.data.images import pixels_to_images, to_pixels, truncated_pixels
from tokenbridge.data.sources import cropped, labels_of, load_images, pixels_of
from tokenbridge.evaluation import metrics
from tokenbridge.evaluation.inception import (
    NUM_FEATURES,
    NUM_LOGITS,
    Inception,
    load_inception,
    write_random_inception,
)
from tokenbridge.evaluation.metrics import Statistics
from tokenbridge.evaluation.reference import read_statistics
from tokenbridge.reproduction.options import PHOTOGRAPHS, Options, write_photographs
from tokenbridge.results.compare import NUM_IMAGES as NUM_IMAGES
from tokenbridge.results.compare import Judged, judge_published
from tokenbridge.results.ledger import published_metrics
from tokenbridge.results.markdown import TITLES, cell, escape, markdown_table, measured_by, tables, tolerance_lines
from tokenbridge.results.schema import STAND_IN as STAND_IN
from tokenbridge.results.schema import Provenance, Results, Row, write
from tokenbridge.results.score import Score, ScoreName, to_metrics
from tokenbridge.sampling.load import STAND_IN_RULE
from tokenbridge.tokenizers.base import LatentTokenizer
from tokenbridge.tokenizers.cost import decoder_flop
from tokenbridge.tokenizers.kl16 import create_kl16, kl16_layout, load_kl16
from tokenbridge.tokenizers.quantizer import gaussian_quantizer
from tokenbridge.utils import provenance
from tokenbridge.utils.console import track
from tokenbridge.utils.devices import best_device
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import check_replaceable, replacing, sha256_of, write_text
from tokenbridge.utils.flop import count, placeholder
from tokenbridge.utils.hashed import recording
from tokenbridge.utils.locks import results_folder
from tokenbridge.weights import artifacts
from tokenbridge.weights.artifacts import IMAGENET, INCEPTION, KL16_VAE, STATISTICS, Status
from tokenbridge.weights.rule import rule_state

FILES = (IMAGENET, KL16_VAE, INCEPTION, STATISTICS)
RESULT_FILES = ("results.json", "tables.md")
IMAGE_SIZE = 256
BATCH_SIZE = 50
NUM_CLASSES = 1000


@dataclass(frozen=True)
class Recipe:
    """A row of the table, and how its latents are quantised."""

    id: str
    label: str
    num_levels: int | None  # None keeps the latents continuous
    value_range: float | None

    @property
    def quantizer(self) -> tuple[int | None, float | None]:
        """The number of levels and the range, which identify a reconstruction. The two tables share some."""
        return self.num_levels, self.value_range

    @property
    def published(self) -> Row:
        """The paper's row, with the metrics that the measured row has."""
        metrics = {"images": float(NUM_IMAGES), **published_metrics(self.id)}
        return Row(id=self.id, label=self.label, metrics=metrics)


SOURCE = "arXiv 2503.16430 v1, table 1"
RECIPES = (
    Recipe("table1a/vae", "VAE, continuous", None, None),
    Recipe("table1a/ptq-8", "post-training, 8 levels", 8, 5.0),
    Recipe("table1a/ptq-16", "post-training, 16 levels", 16, 5.0),
    Recipe("table1a/ptq-32", "post-training, 32 levels", 32, 5.0),
    Recipe("table1a/ptq-64", "post-training, 64 levels", 64, 5.0),
    Recipe("table1b/vae", "VAE, continuous", None, None),
    Recipe("table1b/range-2", "range ±2", 64, 2.0),
    Recipe("table1b/range-3", "range ±3", 64, 3.0),
    Recipe("table1b/range-4", "range ±4", 64, 4.0),
    Recipe("table1b/range-5", "range ±5", 64, 5.0),
)
QUANTIZERS = tuple(dict.fromkeys(recipe.quantizer for recipe in RECIPES))


def reproduce_table1(options: Options, *, out: Path | str) -> tuple[Results, Judged]:
    """Measure table 1, compare it with the paper, and write results.json and tables.md into `out`.

    The images are spread evenly over the classes, and only 50,000 are compared with the paper. `options.seed` is the
    seed of the posterior samples.

    Raises:
        MissingArtifactsError: files are missing. The message lists all of them.
        UserError: a file does not hold what it should, or there are fewer than two images.
    """
    if options.stand_in:
        return _stand_in(options, Path(out))
    num_images, folder, other = options.images_or(NUM_IMAGES), options.folder, options.other_inception
    if other is not None and options.inception is not None:
        raise UserError(f"Scores need one file of Inception's weights, not both {options.inception} and {other}.")
    # The files come first, because it takes only seconds to see that one is missing.
    paths = artifacts.resolve(_needed(options), folder=folder, given=_given(options))
    inception = load_inception(other or paths[INCEPTION], allow_other=other is not None)
    hashes = {key: artifacts.fingerprint(paths[key], folder=folder) for key in (KL16_VAE, STATISTICS)}
    check_replaceable(out, RESULT_FILES)  # before the work whose results it is to hold
    results = measure(
        paths,
        inception,
        scale="paper",
        hashes=hashes,
        num_images=num_images,
        num_classes=NUM_CLASSES,
        batch_size=options.batch_size or BATCH_SIZE,
        seed=options.seed,
    )
    return results, _write(results, Path(out))


def _stand_in(options: Options, out: Path) -> tuple[Results, Judged]:
    """Run table 1 on stand-ins of the same formats, to test the path. This is not a result, and no row is compared.

    The VAE has its full size and the weights that the golden rule draws, and Inception has random weights. Images and
    statistics are those of photographs that scikit-image ships.
    """
    num_images = options.images_or(len(PHOTOGRAPHS))
    check_replaceable(out, RESULT_FILES)
    with tempfile.TemporaryDirectory() as folder:
        files, inception = write_stand_ins(Path(folder))
        results = measure(
            files,
            inception,
            scale=STAND_IN,
            hashes={key: sha256_of(files[key]) for key in (KL16_VAE, STATISTICS)},
            num_images=num_images,
            num_classes=len(PHOTOGRAPHS),
            batch_size=1,
            seed=options.seed,
        )
    return results, _write(results, out)


def plan(options: Options) -> dict[str, Any]:
    """Return the cost of a run and the files that it lacks. Nothing is run, downloaded or hashed.

    FLOP are counted on the full-size VAE. A multiplication and an addition count as two, and Inception is left out.
    """
    num_images = options.images_or(NUM_IMAGES)
    encoder, decoder = vae_tflop()
    states = files(options)
    missing = [status.artifact.key for status in states if status.state == "missing"]
    return {
        "images": num_images,
        "encodings": num_images,
        "decodings": num_images * len(QUANTIZERS),
        "TFLOP per encoding": encoder,
        "TFLOP per decoding": decoder,
        "TFLOP of the VAE": num_images * (encoder + decoder * len(QUANTIZERS)),
        "GB of features": num_images * len(QUANTIZERS) * 4 * (NUM_FEATURES + NUM_LOGITS) / 1e9,
        "files": [status.as_dict() for status in states],
        "missing": missing,
        "next": artifacts.how_to_fetch(missing, options.folder),
    }


def plan_rows(planned: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a plan as lines of a table, each with a name and an amount."""
    parts = f"{planned['TFLOP per encoding']:.3f} an encoding, {planned['TFLOP per decoding']:.3f} a decoding"
    return [
        ("images", f"{planned['images']:,}, encoded once and decoded {len(QUANTIZERS)} times"),
        ("TFLOP of the VAE", f"{planned['TFLOP of the VAE']:,.0f} ({parts})"),
        ("memory", f"{planned['GB of features']:.1f} GB of features"),
        *(
            (file["key"], f"MISSING, from {file['origin']}" if file["state"] == "missing" else file["state"])
            for file in planned["files"]
        ),
        *(("next", command) for command in planned["next"]),
    ]


@torch.inference_mode()
def measure(
    files: Mapping[str, Path],
    inception: Inception,
    *,
    scale: str,
    hashes: Mapping[str, str],
    num_images: int,
    num_classes: int,
    batch_size: int,
    seed: int,
) -> Results:
    """Reconstruct images by every quantiser and score them, on the GPU if there is one.

    Args:
        files: the paths by key of `FILES`, without Inception's weights.
        inception: the network whose features are compared.
        scale: the name of the scale that the results state.
        hashes: the SHA-256 of the VAE and the statistics, which the results state.
        num_images: the number of images of all classes together.
        num_classes: the number of classes that the images must have.
        batch_size: images per forward pass.
        seed: the seed of the posterior samples.

    Raises:
        UserError: a file does not hold what it should, or there are too few images.
    """
    stopwatch = provenance.Stopwatch()
    with recording({Path(files[key]): sha256 for key, sha256 in hashes.items()}):  # those that were hashed
        reference = read_statistics(files[STATISTICS])  # the files that load quickly come first
        tokenizers = make_tokenizers(files[KL16_VAE], best_device())
    dataset = cropped(load_images(str(files[IMAGENET]), "train"), IMAGE_SIZE, 3)
    chosen = choose_images(labels_of(dataset), num_images, num_classes)

    digest = hashlib.sha256()
    outputs: dict[tuple[int | None, float | None], list[tuple[Tensor, Tensor]]] = {q: [] for q in tokenizers}
    batches = chosen.split(batch_size)
    for number, indices in enumerate(track(batches, "Table 1", transient=False)):
        pixels = to_pixels(dataset.select(indices.tolist())["image"])
        digest.update(pixels.numpy().tobytes())
        first = number * batch_size
        latents = sample_latents(tokenizers[None, None], pixels, range(first, first + len(indices)), seed)
        for key, tokenizer in tokenizers.items():
            outputs[key].append(inception_outputs(inception, reconstruct(tokenizer, latents)))

    rows = {
        key: to_metrics([Score("images", num_images), *score(outputs.pop(key), reference, inception.extractor)])
        for key in list(outputs)
    }
    return Results(
        scale=scale,
        provenance=Provenance(
            **stopwatch.record(),
            seed=seed,
            data_sha256={f"{IMAGENET}/train, as measured": digest.hexdigest()},
            weights_sha256={**hashes, INCEPTION: inception.sha256},
            settings={
                "num_images": num_images,
                "batch_size": batch_size,
                "published Inception weights": inception.published,
                "posterior": "sampled once per image",
                "precision": "float32",
                "TF32 in convolutions": torch.backends.cudnn.allow_tf32,  # PyTorch's default, as in the official run
            },
        ),
        rows=[Row(id=r.id, label=r.label, metrics=rows[r.quantizer]) for r in RECIPES],
        trends=[],
    )


def choose_images(labels: Tensor, num_images: int, num_classes: int) -> Tensor:
    """Return indices [num_images] of the first images of each class, class after class, as the official script does.

    If `num_images` is not a multiple of the number of classes, the first classes give one image more.

    Raises:
        UserError: the number of classes is another one, or a class has too few images.
    """
    counts = torch.bincount(labels)
    if len(counts) != num_classes or not bool((counts > 0).all()):
        raise UserError(f"The images have {int((counts > 0).sum())} classes, not {num_classes}.")
    per_class, more = divmod(num_images, num_classes)
    wanted = per_class + (torch.arange(num_classes) < more).long()
    if bool((wanted > counts).any()):
        short = int((wanted > counts).nonzero()[0])
        raise UserError(
            f"Class {short} has {counts[short]} images, but {num_images:,} in all need {wanted[short]} of it."
        )
    by_class = labels.argsort(stable=True)  # within a class, the order of the source is kept: by file name
    starts = counts.cumsum(0) - counts
    return torch.cat([by_class[s : s + n] for s, n in zip(starts.tolist(), wanted.tolist(), strict=True)])


def make_tokenizers(vae: Path | str, device: torch.device) -> dict[tuple[int | None, float | None], LatentTokenizer]:
    """Return the VAE with each quantiser of the table, by (levels, range). (None, None) has no quantiser."""
    model: Any = load_kl16(vae).to(device)
    return {
        (levels, value_range): LatentTokenizer(
            model,
            None if levels is None else gaussian_quantizer(levels, value_range=value_range or 0.0).to(device),
        )
        for levels, value_range in QUANTIZERS
    }


def sample_latents(tokenizer: LatentTokenizer, pixels: Tensor, image_indices: range, seed: int) -> Tensor:
    """Draw the scaled latents [B, C, h, w] of uint8 images [B, 3, H, W] from the VAE's posterior.

    The noise of an image depends only on seed and index. It is drawn on the CPU, so it is the same for every device.
    """
    images = pixels_to_images(pixels.to(tokenizer.device))
    posterior = tokenizer.autoencoder.encode(images).latent_dist
    shape = tuple(posterior.mean.shape[1:])
    draws = [np.random.default_rng((seed, i)).standard_normal(shape, dtype=np.float32) for i in image_indices]
    noise = torch.from_numpy(np.stack(draws)).to(tokenizer.device)
    return (posterior.mean + posterior.std * noise - tokenizer.shift) * tokenizer.scale


def reconstruct(tokenizer: LatentTokenizer, latents: Tensor) -> Tensor:
    """Return uint8 images [B, 3, H, W] of scaled latents [B, C, h, w], quantised if the tokenizer has a quantiser.

    Quirk kept: pixels are truncated, not rounded (see `truncated_pixels`).
    """
    images = tokenizer.images(latents if tokenizer.quantizer is None else tokenizer.quantizer(latents))
    return truncated_pixels(images)


def inception_outputs(inception: Inception, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return features [B, 2048] and logits [B, 1008] of uint8 images [B, 3, H, W], on the CPU."""
    features, logits = inception.network(pixels.to(best_device()))
    return features.cpu(), logits.cpu()


def score(outputs: list[tuple[Tensor, Tensor]], reference: Statistics, extractor: str | None) -> list[Score]:
    """Return rFID against the reference, and Inception Score.

    Args:
        outputs: what `inception_outputs` returned for each batch, N >= 2 images together.
        reference: the statistics of the whole training set.
        extractor: the label of the scores, which is None for the published Inception.
    """
    features, logits = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    label: dict[str, Any] = {"extractor": extractor, "num_images": len(features)}
    inception_score, _ = metrics.inception_score(logits, metrics.SEED)
    return [
        Score("rFID", metrics.frechet_distance(metrics.statistics_of(features), reference), **label),
        Score("IS", inception_score, **label),
    ]


def judge(results: Results) -> Judged:
    """Compare each row with the paper, if it was measured with the paper's weights and number of images."""
    return judge_published(results, {recipe.id: recipe.published for recipe in RECIPES}, NUM_IMAGES)


def to_markdown(results: Results, judged: Judged) -> str:
    """Return both tables beside the paper's, with verdicts, tolerances and the source of the numbers."""
    published = {recipe.id: recipe.published for recipe in RECIPES}
    papers = [str(ScoreName(name, num_images=NUM_IMAGES)) for name in ("rFID", "IS")]
    lines = [f"# Table 1: {results.scale}", "", f"{measured_by(results.provenance)}. Published: {SOURCE}.", ""]
    for table, rows in tables(results).items():
        _, rfid, isc = rows[0].metrics
        header = ["", rfid, "published", isc, "published", "verdict"]
        body = [
            [
                row.label,
                cell(row, rfid),
                cell(published[row.id], papers[0]),
                cell(row, isc),
                cell(published[row.id], papers[1]),
                judged[row.id][0],
            ]
            for row in rows
        ]
        lines += [f"## {TITLES[table]}", "", *markdown_table(header, body), ""]
        said = {f"- {verdict}: {escape(why)}": None for verdict, why in (judged[row.id] for row in rows)}  # each once
        lines += [*said, ""]
    return "\n".join([*lines, *tolerance_lines(papers)])


def vae_tflop() -> tuple[float, float]:
    """Return the VAE's TFLOP to encode and to decode one image of 256 × 256, counted on the meta device."""
    vae: Any = create_kl16()
    encoder = count(lambda: vae.encode(placeholder(1, 3, IMAGE_SIZE, IMAGE_SIZE)))
    return encoder / 1e12, decoder_flop(vae, IMAGE_SIZE // 16) / 1e12


def write_stand_ins(folder: Path) -> tuple[dict[str, Path], Inception]:
    """Write files in the formats of the real ones, and return them as `measure` takes them."""
    files = {IMAGENET: folder / "imagenet", KL16_VAE: folder / "kl16.ckpt", STATISTICS: folder / "statistics.npz"}
    write_photographs(files[IMAGENET])
    torch.save({"model": rule_state(kl16_layout(create_kl16()), STAND_IN_RULE)}, files[KL16_VAE])
    write_random_inception(folder / "inception.pth")
    inception = load_inception(folder / "inception.pth", allow_other=True)
    pixels = pixels_of(load_images(str(files[IMAGENET]), "train"), size=IMAGE_SIZE)
    statistics = metrics.statistics_of(inception_outputs(inception, pixels)[0])
    with replacing(files[STATISTICS]) as temporary:
        np.savez(temporary, mu=statistics.mean, sigma=statistics.covariance)
    return files, inception


def _needed(options: Options) -> list[str]:
    return [key for key in FILES if key != INCEPTION or options.other_inception is None]


def files(options: Options) -> list[Status]:
    """Return the state of each file that the table needs. Nothing is read or downloaded."""
    return artifacts.status(_needed(options), folder=options.folder, given=_given(options))


def _given(options: Options) -> dict[str, Path | None]:
    """Return the files that the user named, by key."""
    return {
        IMAGENET: options.imagenet,
        KL16_VAE: options.vae,
        INCEPTION: options.inception,
        STATISTICS: options.reference,
    }


def _write(results: Results, out: Path) -> Judged:
    judged = judge(results)
    with results_folder(out, RESULT_FILES) as fresh:
        write(fresh / RESULT_FILES[0], results)
        write_text(fresh / RESULT_FILES[1], to_markdown(results, judged))
    return judged
