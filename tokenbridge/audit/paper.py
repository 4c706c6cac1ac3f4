"""What a result file at the paper's scale has to say before its numbers decide a claim.

Anybody can write a result file. One that contradicts itself, or the presets, is refused (`contradiction`). One that
leaves something open can put a claim in doubt, and no more (`doubts`): it has to name the generator, the tokenizer,
Inception and the reference, each with a SHA-256 that was published or recorded here, and say how the images were made.
What no recipe of this project can measure is decided by no file (`unmeasurable`).
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from tokenbridge.models.registry import all_presets, find_preset, unpublished
from tokenbridge.reproduction import table1
from tokenbridge.results.schema import Results, Row
from tokenbridge.results.score import NUM_IMAGES, Score, to_scores
from tokenbridge.results.tolerances import metric
from tokenbridge.sampling.config import Randomness
from tokenbridge.sampling.recipe import CODE
from tokenbridge.utils.devices import Dtype
from tokenbridge.weights import artifacts
from tokenbridge.weights.artifacts import ARTIFACTS, INCEPTION, KL16_VAE, REFERENCE_BATCH, STATISTICS
from tokenbridge.weights.published import Preset

CLOCKS_DIFFER = datetime.timedelta(hours=1)
VARIANTS = ("official", "paper")  # of a preset's sampling settings, which its published scores are of
SMALL_FID = 10.0
PLAUSIBLE = {"IS": 100.0, "precision": 0.5, "recall": 0.3}
"""What goes with an FID below `SMALL_FID`: of all that was published of such systems, the Inception Score is at least
134, precision 0.79 and recall 0.48."""


@dataclass(frozen=True)
class Part:
    """A published file that a row rests on, and how the result file names it."""

    what: str  # "generator"
    key: str  # in `ARTIFACTS`
    name: str | None  # in the hashes of the result file; None if they do not name it
    sha256: str | None


def unmeasurable(row: str) -> str | None:
    """Return why no file can decide a claim about a row at the paper's scale; None if one can."""
    if row in {recipe.id for recipe in table1.RECIPES}:
        return None
    table, _, name = row.partition("/")
    if table != "table3" or name not in all_presets():
        return f"no recipe of this project measures {row} at the paper's scale, so no file decides it"
    reason = unpublished(find_preset(name)[1])
    return reason and f"{reason} of {name}, so no file decides it"


def known_hashes(results: Results, folder: Path | str | None = None) -> dict[str, str | None]:
    """Return the SHA-256 of each published file that rows may rest on, as it was published or else recorded here."""
    keys = {part.key for row in results.rows for part in parts_of(results, row.id, "precision", {})}
    recorded = {status.artifact.key: status.sha256 for status in artifacts.status(keys, folder=folder)}
    return {key: ARTIFACTS[key].sha256 or recorded[key] for key in keys}


def parts_of(results: Results, row: str, metric_name: str, known: Mapping[str, str | None]) -> list[Part]:
    """Return the published files behind a row: generator, tokenizer, Inception, and the references of a metric.

    Args:
        metric_name: adds the reference batch if it is precision or recall.
        known: see `known_hashes`; a reference is found by its hash, or else by its published name.
    """
    weights, data = results.provenance.weights_sha256, results.provenance.data_sha256

    def part(what: str, key: str, name: str, hashes: Mapping[str, str]) -> Part:
        return Part(what, key, name if name in hashes else None, hashes.get(name))

    def reference(what: str, key: str) -> Part:
        file = Path(ARTIFACTS[key].file).name
        by_hash = [name for name, sha256 in data.items() if sha256 == known.get(key)]
        by_name = [name for name in data if Path(name).name == file]
        return part(what, key, next(iter([*by_hash, *by_name]), ""), data)

    if unmeasurable(row) is not None:
        return []
    inception = part("Inception", INCEPTION, INCEPTION, weights)
    if row.startswith("table1"):
        statistics = part("reference statistics", STATISTICS, STATISTICS, weights)
        return [part("tokenizer", KL16_VAE, KL16_VAE, weights), inception, statistics]
    system, preset = find_preset(row.removeprefix("table3/"))
    parts = [
        part("generator", preset.name, "generator", weights),
        part("tokenizer", system.tokenizer.key, system.recipe, weights),
        inception,
        reference("reference statistics", STATISTICS),
    ]
    batch = reference("reference batch", REFERENCE_BATCH)
    if batch.name is not None or metric_name.startswith(("precision", "recall")):
        parts.append(batch)
    return parts


# --------------------------------------------------------------------------------------------------- contradictions


def contradiction(results: Results) -> str | None:
    """Return the first thing in a file of the paper's scale that contradicts another, or that cannot be; or None."""
    return next(_contradictions(results), None)


def _contradictions(results: Results) -> Iterator[str]:
    p = results.provenance
    for name, sha256 in {**p.weights_sha256, **p.data_sha256}.items():
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            yield f"what it gives as the SHA-256 of {name} is none: {sha256[:80]!r}"
    started = datetime.datetime.fromisoformat(p.started)
    if started > datetime.datetime.now(datetime.UTC) + CLOCKS_DIFFER:
        yield f"it started in the future, at {p.started}"
    if p.wall_seconds <= 0:
        yield f"it took {p.wall_seconds:g} seconds"
    elif started.timestamp() + p.wall_seconds > (datetime.datetime.now(datetime.UTC) + CLOCKS_DIFFER).timestamp():
        yield f"it started at {p.started} and took {p.wall_seconds:g} seconds, which have not passed"
    sampler = p.settings.get("sampler")
    for key, place, known in (
        ("randomness", p.settings, get_args(Randomness)),
        ("dtype", sampler, get_args(Dtype)),
        ("compiled", sampler, (True, False)),
    ):
        if isinstance(place, dict) and key in place and not any(_same(place[key], k) for k in known):
            yield f"its {key} is {place[key]!r:.80}, and there are {', '.join(map(str, known))}"
    for key, kind, what in (
        ("num_images", int, "a whole number"),
        ("published Inception weights", bool, "true or false"),
        ("run", dict, "an object"),
        ("sampler", dict, "an object"),
    ):
        if key in p.settings and type(p.settings[key]) is not kind:
            yield f"its setting {key!r} is {p.settings[key]!r:.80}, not {what}"
    yield from _of_run(results)
    yield from _of_sampler(results)
    measured = [row for row in results.rows if row.not_run is None]
    sampled = [row.id for row in measured if row.id.startswith("table3/")]
    if len(sampled) > 1 and "generator" in p.weights_sha256:
        yield f"it names one generator for {len(sampled)} rows: {', '.join(sampled[:3])}"
    for row in measured:
        yield from (f"{row.id}: {wrong}" for wrong in _of_row(results, row))


def _of_run(results: Results) -> Iterator[str]:
    """What the record of the sampling run contradicts."""
    p, run = results.provenance, results.provenance.settings.get("run")
    if type(run) is not dict:
        return
    for key in ("num_images", "num_made"):
        if type(run.get(key)) is not int or run[key] < 0:
            yield f"{key} of its run is {run.get(key)!r:.80}, not a whole number"
            return
    seconds = run.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0:
        yield f"the seconds of its run are {seconds!r:.80}"
        return
    changes = run.get("changes", [])
    if not isinstance(changes, list) or not all(isinstance(change, str) for change in changes):
        yield f"the changes of its run are {changes!r:.80}, not a list of sentences"
    if run["num_images"] != p.settings.get("num_images"):
        yield f"its run has {run['num_images']:,} images, and its setting num_images is {p.settings.get('num_images')}"
    if run["num_made"] > run["num_images"]:
        yield f"its run made {run['num_made']:,} of {run['num_images']:,} images"
    if seconds > p.wall_seconds + 1:
        yield f"its run took {seconds:g} seconds, and all of it {p.wall_seconds:g}"
    if run["num_made"] and seconds <= 0:
        yield f"its run made {run['num_made']:,} images in {seconds:g} seconds"


def _of_sampler(results: Results) -> Iterator[str]:
    """What the record of the sampler contradicts."""
    sampler = results.provenance.settings.get("sampler")
    if type(sampler) is not dict or "weights" not in sampler:
        return
    weights, named = sampler["weights"], results.provenance.weights_sha256
    if not isinstance(weights, dict) or "rule" in weights:
        yield "its sampler had stand-in weights, which were drawn by a rule"
        return
    for part, sha256 in weights.items():
        if part in named and named[part] != sha256:
            yield f"its sampler had another {part} than the one whose SHA-256 it names"


def _of_row(results: Results, row: Row) -> Iterator[str]:
    settings, metrics = results.provenance.settings, row.metrics
    if "stand-in weights" in row.label.lower():
        yield f"it is of stand-in weights ({row.label[:80]!r})"
    if "images" in metrics and metrics["images"] != settings.get("num_images"):
        yield f"it has {metrics['images']:g} images, and the setting num_images is {settings.get('num_images')}"
    yield from _of_times(results, metrics)
    yield from _of_scores(to_scores(metrics), published=settings.get("published Inception weights") is True)
    if row.id.startswith("table3/") and unmeasurable(row.id) is None:
        system, preset = find_preset(row.id.removeprefix("table3/"))
        sampler = settings["sampler"] if isinstance(settings.get("sampler"), dict) else {}
        if metrics.get("parameters", preset.num_parameters) != preset.num_parameters:
            yield f"it has {metrics['parameters']:,.12g} parameters, and {preset.name} has {preset.num_parameters:,}"
        if (counted := sampler.get("num_parameters", preset.num_parameters)) != preset.num_parameters:
            yield f"its sampler has {counted!r:.80} parameters, and {preset.name} has {preset.num_parameters:,}"
        if sampler.get("system", system.name) != system.name:
            yield f"its sampler is one of {sampler['system']!r:.80}, and {preset.name} is of {system.name}"


def _of_times(results: Results, metrics: Mapping[str, float]) -> Iterator[str]:
    """Contradictions between the seconds of an image, of the run and of everything."""
    each, run = metrics.get("seconds per image"), results.provenance.settings.get("run")
    if each is None:
        return
    if each <= 0:
        yield f"an image took {each:g} seconds"
    # Without a record of the run nothing says how many images this call made; it is then in doubt for that reason.
    elif isinstance(run, dict) and not math.isclose(each * run["num_made"], run["seconds"], rel_tol=0.01, abs_tol=0.01):
        yield f"an image took {each:g} seconds, and {run['num_made']:,} images {run['seconds']:g}"


def _of_scores(scores: list[Score], *, published: bool) -> Iterator[str]:
    """Scores that cannot be of the same images, and intervals that do not hold their value."""
    by_family: dict[tuple[str, str | None], list[Score]] = {}
    for score in scores:
        by_family.setdefault((score.metric.removesuffix("-cleanfid"), score.extractor), []).append(score)
        ends = [end for end in (score.low, score.high) if end is not None]
        if len(ends) == 1:
            yield f"the interval of {score.name} has one end"
        elif ends and not ends[0] - 1e-9 <= score.value <= ends[1] + 1e-9:
            yield f"the interval of {score.name}, {ends[0]:g} to {ends[1]:g}, does not hold its value {score.value:g}"
        if published and score.extractor is not None:
            yield f"{score.name} is not by the published Inception weights, which the file says it used"
    for family in by_family.values():
        low, high = (pick(family, key=lambda score: score.value) for pick in (min, max))
        granted = metric(low.name).tolerance.of(low.value) if metric(low.name).is_compared else math.inf
        if high.value - low.value > granted:
            yield f"{low.name} is {low.value:g} and {high.name} is {high.value:g}, and both are of the same images"


# ----------------------------------------------------------------------------------------------------------- doubts


def doubts(results: Results, row: Row, metric_name: str, known: Mapping[str, str | None]) -> list[str]:
    """Return everything that a row leaves open, as parts of a sentence; with any of it, it decides nothing.

    Args:
        metric_name: the metric that is claimed.
        known: the SHA-256 of published files that was published or recorded here, by key.
    """
    settings, found = results.provenance.settings, []
    for part in parts_of(results, row.id, metric_name, known):
        if part.sha256 is None:
            found.append(f"the file names no {part.what}")
        elif known.get(part.key) is None:
            found.append(f"the SHA-256 of its {part.what} is neither published nor recorded here")
    if row.id.startswith("table1"):
        wanted = {"posterior": "sampled once per image", "precision": "float32"}
        found += [f"the {key} was not {value}" for key, value in wanted.items() if settings.get(key) != value]
        if not any(name.startswith("imagenet/train") for name in results.provenance.data_sha256):
            found.append("the file names no hash of the images that were reconstructed")
    else:
        found += _doubts_of_samples(results, find_preset(row.id.removeprefix("table3/"))[1], known)
    if "images" not in row.metrics:
        found.append("the row does not count its images")
    if results.provenance.dirty is True:
        found.append("the code that measured had uncommitted changes")
    values = {score.metric: score.value for score in to_scores(row.metrics) if score.num_images == NUM_IMAGES}
    if values.get("FID", math.inf) < SMALL_FID:
        for name, least in PLAUSIBLE.items():
            if values.get(name, math.inf) < least:
                found.append(f"{name} {values[name]:g} does not go with FID {values['FID']:g}")
    return found


def _doubts_of_samples(results: Results, preset: Preset, known: Mapping[str, str | None]) -> Iterator[str]:
    """What a file leaves open about how the images were made."""
    settings, data = results.provenance.settings, results.provenance.data_sha256
    system = find_preset(preset.name)[0]
    others = data.keys() - {part.name for part in parts_of(results, f"table3/{preset.name}", "", known)}
    if not others:
        yield "the file names no hash of the images that were scored"
    elif len(others) > 1:
        yield "the file names other images or references than those of the claim"
    sampler = settings.get("sampler", {})
    recipes = [preset.sampling[name] for name in VARIANTS if name in preset.sampling]
    if not {"system", "num_parameters", "sampling", "weights"} <= sampler.keys():
        yield "the file does not say with what weights and settings the images were sampled"
    elif not any(_same(sampler["sampling"], asdict(recipe.config)) for recipe in recipes):
        yield f"the images were not sampled with the published settings ({_difference(sampler, recipes[0].config)})"
    yield from _doubts_of_model(sampler, preset)
    if "run" not in settings:
        yield "the file has no record of the sampling run"
    elif changes := [change for change in settings["run"].get("changes", []) if change.startswith(f"{CODE}.")]:
        yield f"some of the images were made by other code or libraries ({changes[0][:200]})"
    if settings.get("labels") != (system.evaluation.labels or "balanced"):
        yield f"the labels were not {system.evaluation.labels or 'balanced'}"


def _doubts_of_model(sampler: Mapping[str, Any], preset: Preset) -> Iterator[str]:
    """What the record of the sampler says of the model that no run of the preset does."""
    if "config" not in sampler:  # files of before it was recorded
        return
    config = sampler["config"] if isinstance(sampler["config"], dict) else {}
    sizes = config["generator"] if isinstance(config.get("generator"), dict) else {}
    if off := [key for key, size in preset.model.items() if not _same(sizes.get(key), size)]:
        yield f"the {off[0]} of its generator is not that of {preset.name}"


def _same(found: Any, wanted: Any) -> bool:
    return json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def _difference(sampler: Mapping[str, Any], config: Any) -> str:
    """Return the first setting that is not the published one."""
    found, wanted = sampler["sampling"], asdict(config)
    if not isinstance(found, dict):
        return f"{found!r:.80}"
    off = next((key for key in [*wanted, *found] if not _same(found.get(key), wanted.get(key))), "")
    return f"{off[:80]} {found.get(off)!r:.80} against {wanted.get(off)!r}"
