"""The effects of the discrepancies between the paper and its code, and within the code, measured at one scale.

Each comparison is a function that returns a row for each arm. All arms are measured in the same run with the same
seeds, and image i of a seed has the same random numbers in all of them. Rows are called
`discrepancies/<comparison>-<arm>`. A score of samples is the mean over several seeds, `±` is the standard deviation
over the seeds, and `change of` is the difference from the comparison's first row, seed by seed.

Shape letters: N images or values, L positions, C channels, V levels, W head width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenbridge.reproduction.discrepancies.baselines import givt_guidance, givt_no_class, llamagen_zero_row
from tokenbridge.reproduction.discrepancies.head import final_layer, first_element, head_cache
from tokenbridge.reproduction.discrepancies.precision import latents_precision, tokens_precision
from tokenbridge.reproduction.discrepancies.quantizing import encode, gaussian_fit, posterior, read_latents
from tokenbridge.reproduction.discrepancies.sampling import class_labels, num_images, pixels, temperature
from tokenbridge.reproduction.discrepancies.study import NUM_SEEDS, Study
from tokenbridge.reproduction.workbench import hashes_of_images, hashes_of_models, open_workbench
from tokenbridge.results.markdown import cell, columns_of, escape, markdown_table, measured_by, trend_lines
from tokenbridge.results.schema import Provenance, Results, Row, Trend, write
from tokenbridge.results.score import ScoreName, change_of, deviation_of
from tokenbridge.utils import files, provenance
from tokenbridge.utils.console import log
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import write_text
from tokenbridge.utils.hashed import recording
from tokenbridge.utils.locks import results_folder

if TYPE_CHECKING:
    from tokenbridge.configs.schema import Scale


COMPARISONS: dict[str, tuple[str, Callable[[Study], list[Row]]]] = {
    "first-element": ("First element of the head's sequence", first_element),
    "final-layer": ("Order of the final layer's modulation", final_layer),
    "head-cache": ("Key/value cache of the head", head_cache),
    "temperature": ("Temperature of TokenBridge-L", temperature),
    "encode": ("Encoding: nearest value or bin", encode),
    "gaussian-fit": ("What the Gaussian bins are fitted to", gaussian_fit),
    "posterior": ("Posterior of the autoencoder, reconstruction with 64 levels", posterior),
    "tokens": ("Generation in half precision, one seed, half the images", tokens_precision),
    "latents": ("Quantising in half precision: tokens that differ from float32", latents_precision),
    "labels": ("Class labels of the samples", class_labels),
    "pixels": ("Images to 8 bits", pixels),
    "num-images": ("Number of images", num_images),
    "givt-guidance": ("GIVT: rejection sampling of the guided density", givt_guidance),
    "givt-no-class": ("GIVT: embedding for no class", givt_no_class),
    "llamagen-zero-row": ("LlamaGen: rotary row of the class token", llamagen_zero_row),
}
"""The title and the function of each comparison."""

FILES = ("results.json", "tables.md")


def trends(rows: Sequence[Row], extractor: str) -> list[Trend]:
    """Decide which changes of the Fréchet distance are within the seeds' noise, two deviations pooled over the arms."""
    asked = {
        "first-element-training": "the head's first element as in training",
        "final-layer-swapped": "the final layer's scale and shift in DiT's order",
        "temperature-0.97": "temperature 0.97 instead of 0.96",
        "labels-random": "labels at random instead of balanced",
        "pixels-truncated": "pixels cut off instead of rounded",
        "givt-no-class-untrained": "GIVT's embedding for no class untrained",
        "llamagen-zero-row-rotated": "LlamaGen's class token with a rotary row",
    }
    name = str(ScoreName("FID", extractor=extractor))
    by_arm = {row.id.removeprefix("discrepancies/"): row.metrics for row in rows if row.not_run is None}
    found = []
    for arm, text in asked.items():
        if arm not in by_arm:
            continue
        comparison = arm.rpartition("-")[0]
        first = next(metrics for other, metrics in by_arm.items() if other.startswith(f"{comparison}-"))
        noise = math.sqrt((first[deviation_of(name)] ** 2 + by_arm[arm][deviation_of(name)] ** 2) / 2)
        if noise > 0:
            ratio = round(abs(by_arm[arm][change_of(name)]) / noise, 4)
            claim = f"{text}: {name} changes by no more than the seeds' noise (in its deviations)"
            found.append(Trend(id=f"noise-{comparison}", claim=claim, measured=ratio, relation="<=", bound=2.0))
    return found


def measure_discrepancies(
    scale: Scale,
    *,
    weights: Path | str | None = None,
    out: Path | str,
    latents: Path | None = None,
    num_images: int = 1000,
    seed: int = 0,
) -> Results:
    """Measure every comparison at a scale, and write results.json and tables.md into `out`.

    Args:
        scale: the scale whose models and images are used.
        weights: the folder of the scale's models, by default the shipped ones.
        out: the folder for the results.
        latents: an .npz of real latents to quantise, as `read_latents` takes it. Without one, rows about them are not
            run.
        num_images: samples of each seed, spread evenly over the classes.
        seed: the first of NUM_SEEDS seeds.

    Raises:
        MissingFileError: the weights of the autoencoder, the classifier or TokenBridge are missing.
        UserError: the latents cannot be used, or `num_images` is not a multiple of twice the number of classes.
    """
    stopwatch = provenance.Stopwatch()
    if num_images < 1 or num_images % (2 * len(scale.classes)):
        raise UserError(f"The number of images must be a multiple of twice the {len(scale.classes)} classes.")
    if latents is not None:
        read_latents(latents)  # before the work, so that a bad file does not cost minutes
    weights = Path(weights or files.reference_folder() / scale.name / "weights")
    files.check_replaceable(out, FILES)
    with recording() as read:
        bench = open_workbench(scale, weights)
    with recording(read), results_folder(out, FILES) as fresh:
        study = Study(bench, num_images, seed, latents)
        rows = []
        for title, compare in COMPARISONS.values():
            log(title)
            rows += compare(study)
        given = {} if latents is None else {f"given latents ({latents.name})": read[latents]}
        measured = Results(
            scale=scale.name,
            provenance=Provenance(
                **stopwatch.record(),
                seed=seed,
                data_sha256=hashes_of_images(scale) | given,
                weights_sha256=hashes_of_models(read, scale, weights),
                settings={
                    "num_images": num_images,
                    "num_seeds": NUM_SEEDS,
                    **{recipe.name: dataclasses.asdict(recipe.sampling) for recipe in scale.recipes if recipe.sampling},
                },
            ),
            rows=rows,
            trends=trends(rows, bench.extractor),
        )
        write(fresh / FILES[0], measured)
        write_text(fresh / FILES[1], to_markdown(measured))
        return measured


def by_comparison(results: Results) -> dict[str, list[Row]]:
    """Return the rows of each comparison by its title."""
    found: dict[str, list[Row]] = {title: [] for title, _ in COMPARISONS.values()}
    for row in results.rows:
        arm = row.id.removeprefix("discrepancies/")
        name = max((c for c in COMPARISONS if arm.startswith(f"{c}-")), key=len)
        found[COMPARISONS[name][0]].append(row)
    return found


def to_markdown(results: Results) -> str:
    """Return all comparisons as one Markdown page."""
    p = results.provenance
    lines = [f"# What the discrepancies do, at scale {results.scale}", ""]
    settings = f"{p.settings['num_images']:,} samples of each of {p.settings['num_seeds']} seeds, the first {p.seed}"
    legend = "±: standard deviation over seeds. Change: from the first row, seed by seed."
    lines += [f"{measured_by(p, settings)}. {legend}", ""]
    for title, rows in by_comparison(results).items():
        run = [row for row in rows if row.not_run is None]
        lines += [f"## {title}", ""]
        if run:
            columns = columns_of(run)
            lines += [
                *markdown_table(
                    ["", *map(escape, columns)], [[escape(r.label), *[cell(r, c) for c in columns]] for r in run]
                ),
                "",
            ]
        lines += [f"- {escape(row.label)}: not run: {escape(row.not_run)}" for row in rows if row.not_run] + [""] * (
            len(run) < len(rows)
        )
    if results.trends:
        lines += ["## Within the seeds' noise?", ""]
        lines += trend_lines(results.trends)
    return "\n".join(lines)
