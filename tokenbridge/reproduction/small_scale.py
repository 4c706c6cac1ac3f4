"""Reproduce the paper's tables at a small scale, from shipped or newly trained weights, and judge every row.

The tables come in the order of the paper: reconstruction (table 1), design choices of the generator (table 2), systems
(table 3), and the time of one prediction (table 5). Pictures and `results.json` are written to one folder.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenbridge.configs.scales import is_shipped
from tokenbridge.data.images import pixels_to_images
from tokenbridge.data.pictures import save_grid
from tokenbridge.evaluation.metrics import class_accuracy, score
from tokenbridge.evaluation.reconstruct import reconstruct_with, reconstruction_scores
from tokenbridge.models.noise import PerImage
from tokenbridge.models.registry import SYSTEMS
from tokenbridge.models.system import change_settings
from tokenbridge.reproduction.timing import prediction_time_rows
from tokenbridge.reproduction.trends import trends
from tokenbridge.reproduction.workbench import (
    MAIN_SYSTEM,
    Workbench,
    hashes_of_images,
    hashes_of_models,
    open_workbench,
)
from tokenbridge.results import markdown
from tokenbridge.results import schema as results
from tokenbridge.results.schema import Provenance, Results, Row
from tokenbridge.results.score import Score, read_name, to_metrics
from tokenbridge.sampling.sample import sample_pixels
from tokenbridge.tokenizers.base import LatentTokenizer
from tokenbridge.tokenizers.distortion import measure_distortion
from tokenbridge.tokenizers.quantizer import gaussian_quantizer
from tokenbridge.training.train import how_to_train
from tokenbridge.utils import provenance
from tokenbridge.utils.console import log
from tokenbridge.utils.errors import MissingFileError, UserError
from tokenbridge.utils.files import check_replaceable, write_text
from tokenbridge.utils.hashed import recording
from tokenbridge.utils.locks import results_folder
from tokenbridge.weights.diffusers import WEIGHTS_FILE

if TYPE_CHECKING:
    from tokenbridge.configs.schema import Scale


FILES = ("results.json", "tables.md", "tokens.json", "reconstruction.png", "samples-*.png")
LEVELS = (8, 16, 32, 64)  # table 1a
RANGES = (2.0, 3.0, 4.0, 5.0)  # table 1b


# Rows of the tables: id, label, and the recipe that is measured. Rows of table 2 show only the paper's columns.
GENERATION_ROWS = (
    ("table2a/parallel", "parallel", "parallel-64"),
    ("table2a/autoregressive", "autoregressive", MAIN_SYSTEM),
    ("table2b/natural", "natural order", "tokenbridge-64-natural"),
    ("table2b/frequency", "frequency order", MAIN_SYSTEM),
    ("table2c/16", "16 levels", "tokenbridge-16"),
    ("table2c/64", "64 levels", MAIN_SYSTEM),
    ("table3/tokenbridge", "TokenBridge (64 levels, AR head)", MAIN_SYSTEM),
    ("table3/tokenbridge-16", "TokenBridge (16 levels, AR head)", "tokenbridge-16"),
    ("table3/parallel", "parallel head (64 levels)", "parallel-64"),
    ("table3/llamagen", "LlamaGen (VQ tokens)", "llamagen"),
    ("table3/givt", "GIVT (Gaussian mixtures)", "givt"),
    ("table3/mar", "MAR (diffusion head)", "mar"),
)
COMPARISON_ROWS = (
    ("table3/tokenbridge-as-many", "TokenBridge, as many as test images", "as many"),
    ("table3/real", "real test images", "real"),
)


def reproduce_scale(
    scale: Scale,
    *,
    weights: Path | str,
    out: Path | str,
    reference: Path | str | None,
    num_images: int = 2000,
    seed: int = 0,
) -> tuple[Results, Results | None]:
    """Reproduce all tables of a scale; write results.json, tables.md and pictures into `out`.

    Args:
        weights: the folder of the scale's models.
        reference: the result file to compare with; None compares with nothing.
        num_images: samples of each system, spread evenly over the classes.

    Returns:
        (results, reference results or None).

    Raises:
        MissingFileError: the weights of the classifier or of an autoencoder are missing.
        UserError: the reference is not a result file, or `num_images` is not a multiple of the number of classes.
    """
    stopwatch = provenance.Stopwatch()
    shipped = [recipe.name for recipe in scale.recipes if is_shipped(scale, recipe.name, weights)]
    if num_images < 1 or num_images % len(scale.classes):
        raise UserError(f"The number of images must be a multiple of {len(scale.classes)} classes.")
    stored = results.read(reference) if reference is not None else None  # first: a damaged file must not cost minutes
    check_replaceable(out, FILES)  # and a target that is refused must not either
    with recording() as read:
        bench = open_workbench(scale, weights)
    with recording(read), results_folder(out, FILES) as fresh:
        rows = [*reconstruction_rows(bench, fresh), *generation_rows(bench, fresh, num_images, seed)]
        write_text(fresh / "tokens.json", json.dumps(golden_tokens(bench)))
        rows += prediction_time_rows(bench)
        measured = Results(
            scale=scale.name,
            provenance=Provenance(
                **stopwatch.record(),
                seed=seed,
                data_sha256=hashes_of_images(scale),
                weights_sha256=hashes_of_models(read, scale, weights),
                settings={
                    "num_images": num_images,
                    **({"shipped models": shipped} if shipped else {}),
                    **{recipe.name: dataclasses.asdict(recipe.sampling) for recipe in scale.recipes if recipe.sampling},
                },
            ),
            rows=rows,
            trends=trends(rows),
        )
        results.write(fresh / "results.json", measured)
        write_text(fresh / "tables.md", markdown.to_markdown(measured, stored))
        return measured, stored


def reconstruction_rows(bench: Workbench, out: Path) -> list[Row]:
    """Measure tables 1a and 1b on the test images, and draw the grid of reconstructions."""
    log("Table 1: reconstruction")
    vq = bench.vq
    latents = bench.latents.latents(pixels_to_images(bench.test_pixels).to(bench.device)).cpu()

    def measure(tokenizer: Any) -> tuple[dict[str, float], Tensor]:
        """Return the metrics and the reconstructions of the test images."""
        pixels, bits = reconstruct_with(tokenizer, bench.test_pixels)
        scores = reconstruction_scores(
            bench.test_pixels, pixels, classifier=bench.classifier, extractor=bench.extractor, bits=bits
        )
        return to_metrics(scores), pixels

    @functools.cache  # 64 levels at the widest range are a row of both tables
    def measure_quantised(levels: int, value_range: float) -> tuple[dict[str, float], Tensor]:
        quantizer = gaussian_quantizer(levels, value_range=value_range)
        distortion = measure_distortion(quantizer, latents).relative_mse
        metrics, pixels = measure(LatentTokenizer(bench.latents.autoencoder, quantizer.to(bench.device)))
        return {**metrics, "relative MSE": distortion}, pixels

    continuous = measure(bench.latents)
    measured = {
        "table1a/vae": ("VAE, continuous", continuous),
        **{f"table1a/ptq-{n}": (f"post-training, {n} levels", measure_quantised(n, RANGES[-1])) for n in LEVELS},
        "table1a/vq": (f"VQ, {vq.num_codes} codes", measure(vq)),
        "table1b/vae": ("VAE, continuous", continuous),
        **{f"table1b/range-{r:g}": (f"range ±{r:g}", measure_quantised(LEVELS[-1], r)) for r in RANGES},
    }
    pictures = {"original": bench.test_pixels}
    pictures |= {label: pixels for id_, (label, (_, pixels)) in measured.items() if id_.startswith("table1a")}
    shown = _first_of_each_class(bench.test_labels, len(bench.scale.classes))
    save_grid(
        out / "reconstruction.png",
        [pixels[shown] for pixels in pictures.values()],
        list(pictures),
        f"Reconstruction of {bench.scale.data} (test images)",
        column_names=bench.scale.classes,
    )
    return [Row(id=id_, label=label, metrics=metrics) for id_, (label, (metrics, _)) in measured.items()]


def generation_rows(bench: Workbench, out: Path, num_images: int, seed: int) -> list[Row]:
    """Sample every generator, measure tables 2a, 2b, 2c and 3, and draw a grid of samples for each."""
    measured: dict[str, dict[str, float]] = {}
    missing: dict[str, str] = {}
    labels = torch.arange(num_images) % len(bench.scale.classes)  # every class in turn
    for recipe in bench.scale.recipes:
        if recipe.sampling is None:
            continue
        try:
            sampler = bench.sampler(recipe.name)
        except MissingFileError as error:
            how = how_to_train(bench.scale, recipe.name, bench.weights)
            missing[recipe.name] = f"there are no weights of {recipe.name}; {how}"
            log(f"Not run: {error}")
            continue
        log(f"Sampling {num_images} images: {recipe.name}")
        clock = time.perf_counter()
        pixels = sample_pixels(sampler, labels, seed)
        seconds = (time.perf_counter() - clock) / num_images
        measured[recipe.name] = {
            **measure_samples(bench, pixels, labels),
            "parameters": float(sum(p.numel() for p in sampler.model.parameters())),
            "seconds per image": seconds,
        }
        _sample_grid(bench, out / f"samples-{recipe.name}.png", pixels, recipe.name, recipe.sampling)
        if recipe.name == MAIN_SYSTEM:
            confident = change_settings(recipe.name, recipe.sampling, {"position_order": "confidence"})
            few = labels[: 10 * len(bench.scale.classes)]
            shown = sample_pixels(replace(sampler, settings=confident), few, seed)
            _sample_grid(bench, out / f"samples-{recipe.name}-confidence.png", shown, recipe.name, confident)
            # The Fréchet distance falls with the number of images, so the row beside the real images has as many.
            as_many = min(num_images, len(bench.test_pixels))
            measured["as many"] = measure_samples(bench, pixels[:as_many], labels[:as_many])
    log(f"Scoring real {bench.scale.data}: test against training images")
    measured["real"] = measure_samples(bench, bench.test_pixels, bench.test_labels)

    rows = [*GENERATION_ROWS, *_other_rows(bench.scale), *COMPARISON_ROWS]
    short = ("FID", "IS", "class accuracy")
    found = []
    for id_, label, name in rows:
        if name not in measured:
            reason = missing.get(name, f"scale {bench.scale.name} has no recipe {name}")
            found.append(Row(id=id_, label=label, metrics={}, not_run=reason))
            continue
        values = measured[name]
        whole = id_.startswith("table3/")
        metrics = {key: value for key, value in values.items() if whole or read_name(key).metric in short}
        found.append(Row(id=id_, label=label, metrics=metrics))
    return found


def _other_rows(scale: Scale) -> list[tuple[str, str, str]]:
    """Return a row of table 3 for each generator that `GENERATION_ROWS` lacks, such as a system that somebody added."""
    named = {name for _, _, name in GENERATION_ROWS}
    return [(f"table3/{r.name}", r.name, r.name) for r in scale.recipes if r.is_generator and r.name not in named]


def golden_tokens(bench: Workbench, *, num_images: int = 10, seed: int = 0) -> dict[str, list[Any]]:
    """Return the tokens of a few images of each generator that has weights; the regression gate compares them.

    Tokens are [N, L, C] for TokenBridge and [N, L] for LlamaGen. Of MAR and GIVT the latents [N, C, h, w] are
    returned, rounded to 3 decimals.
    """
    labels = torch.arange(num_images) % len(bench.scale.classes)
    found = {}
    for recipe in bench.scale.recipes:
        if recipe.is_generator and (bench.weights / recipe.name / WEIGHTS_FILE).is_file():
            generate, noise = SYSTEMS[recipe.kind].generate, PerImage(seed, range(num_images))
            values = generate(bench.model(recipe.name), labels, recipe.sampling, noise)
            found[recipe.name] = (values.double().round(decimals=3) if values.is_floating_point() else values).tolist()
    return found


def measure_samples(bench: Workbench, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """Score images against the training images, and measure their class accuracy."""
    found = score(pixels, bench.train_pixels, bench.classifier, extractor=bench.extractor)
    rounded = {one.metric: replace(one.bare, value=round(one.value, 6)) for one in found}
    shown = [rounded[name] for name in ("FID", "IS", "precision", "recall", "KID", "FID-cleanfid")]
    accuracy = class_accuracy(pixels, labels, bench.classifier)
    return to_metrics([Score("images", len(pixels)), *shown, Score("class accuracy", accuracy)])


def _first_of_each_class(labels: Tensor, num_classes: int) -> list[int]:
    return [int((labels == c).nonzero()[0, 0]) for c in range(num_classes)]


def _sample_grid(bench: Workbench, path: Path, pixels: Tensor, name: str, config: Any) -> None:
    """Draw the first ten samples of each class, one row per class."""
    classes = bench.scale.classes
    rows = [pixels[c :: len(classes)][:10] for c in range(len(classes))]
    settings = dataclasses.asdict(config)
    shown = ("guidance_scale", "guidance_weight", "temperature", "num_iterations", "num_diffusion_steps")
    words = [f"{key.replace('_', ' ')} {settings[key]}" for key in shown if key in settings]
    if settings.get("position_order", "random") != "random":
        words.append(f"{settings['position_order']} order")
    save_grid(path, rows, classes, f"{name}: {', '.join(words).replace('num ', '')}")
