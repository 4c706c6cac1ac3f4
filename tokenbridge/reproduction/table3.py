"""A row of the paper's table 3 from published weights: 50,000 samples are scored and compared with the paper.

Every system has its own files, settings and published numbers (`models/*/system.py`), and all share one evaluation.

The files are looked for first, so that a missing one costs seconds and not hours. The sampling run follows
(`sampling/run.py`), which may have many processes and resumes after it was killed. The scores come last
(`evaluation/evaluate.py`): FID and Inception Score against the statistics of the official evaluation, precision and
recall against the images of ADM's reference batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic_core import to_jsonable_python

from tokenbridge.evaluation.evaluate import evaluate
from tokenbridge.evaluation.inception import Inception, load_inception, write_random_inception
from tokenbridge.evaluation.reference import load_reference, make_reference
from tokenbridge.models.registry import published_preset
from tokenbridge.reproduction.options import PHOTOGRAPHS, Options, write_photographs
from tokenbridge.results.compare import NUM_IMAGES as NUM_IMAGES
from tokenbridge.results.compare import Judged, judge_published
from tokenbridge.results.ledger import published_metrics
from tokenbridge.results.markdown import cell, escape, markdown_table, measured_by, tolerance_lines
from tokenbridge.results.schema import STAND_IN as STAND_IN
from tokenbridge.results.schema import Provenance, Results, Row, write
from tokenbridge.results.score import Score, to_metrics
from tokenbridge.sampling.config import RunConfig
from tokenbridge.sampling.load import STAND_IN_IMAGES, NamedModel, find_model
from tokenbridge.sampling.plan import Plan
from tokenbridge.sampling.sample import plan_sampling, sample_model
from tokenbridge.utils import provenance
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import make_folder, replacing_folder, write_text
from tokenbridge.utils.processes import process_state
from tokenbridge.weights import artifacts
from tokenbridge.weights.artifacts import Status
from tokenbridge.weights.diffusers import PIPELINE_FILE
from tokenbridge.weights.published import Preset

IMAGE_SIZE = 256
BATCH_SIZE = 64
NUM_BOOTSTRAP = 100
STAND_IN_BOOTSTRAP = 2  # a resample takes seconds, whatever the number of images
PHOTOGRAPH_FILES = tuple(f"train/{name}/{name}.png" for name in PHOTOGRAPHS)
SCORES = ("FID", "IS", "precision", "recall")  # the scores in the paper's table


def needed_files(name: str, options: Options) -> list[str]:
    """Return the keys of the files that a row needs for the model, its tokenizer and the evaluation.

    Raises:
        UserError: the weights or the settings of the preset were not published.
    """
    system, preset = published_preset(name)
    keys = [preset.name, system.tokenizer.key, artifacts.INCEPTION, artifacts.STATISTICS]
    return [*keys, artifacts.REFERENCE_BATCH] if options.precision_recall else keys


def reproduce_table3(
    name: str, options: Options, *, out: Path | str, show_progress: bool = True
) -> tuple[Results, Judged] | None:
    """Sample and score a published model, and write results.json, tables.md and grid.png into `out`.

    Every process of a distributed run calls this function, and the main process scores. A new call resumes a run that
    was killed.

    Args:
        name: the name of the preset.
        options: the options of the user.
        out: the folder of the run.
        show_progress: whether to show the progress on stderr.

    Returns:
        The results, and (verdict, reason) by row id; None in all processes except the main one.

    Raises:
        MissingArtifactsError: files are missing. The message lists all of them.
        UserError: a file does not hold what it should, or a setting is out of range.
    """
    options.images_or(NUM_IMAGES)
    if options.stand_in:
        return _stand_in(name, options, Path(out), show_progress)
    system, preset = published_preset(name)
    asked = find_model(preset.name, variant=options.variant)
    asked.check(_run_config(options, asked))  # a wrong setting is found before files are missed
    state = process_state()
    with state.main_process_first():  # one process downloads the files, and the others find them
        paths = artifacts.resolve(needed_files(name, options), folder=_folder(options), given=_given(name, options))
    model = find_model(
        preset.name,
        variant=options.variant,
        weights=paths[preset.name],
        vae=paths[system.tokenizer.key],
    )
    references = [paths[artifacts.STATISTICS]]
    if options.precision_recall:
        references.append(paths[artifacts.REFERENCE_BATCH])
    return _measure(preset, model, options, Path(out), paths[artifacts.INCEPTION], references, show_progress)


def _stand_in(name: str, options: Options, out: Path, show_progress: bool) -> tuple[Results, Judged] | None:
    """Run the full-size model with weights drawn by the golden rule, to test the path. This is not a result.

    There are few images, iterations and resamples, Inception has random weights, and the statistics are those of
    photographs that scikit-image ships.
    """
    _, preset = published_preset(name)
    model = find_model(preset.name, variant=options.variant).for_stand_in()
    inception, reference = out / "stand-in" / "inception.pth", out / "stand-in" / "reference.npz"
    if process_state().is_main_process:
        write_random_inception(inception)
        photographs = out / "stand-in" / "photographs"
        with replacing_folder(photographs, PHOTOGRAPH_FILES) as temporary:
            write_photographs(temporary)
        make_reference(
            str(photographs),
            reference,
            inception=load_inception(inception, allow_other=True),
            image_size=model.image_size,
            keep_images=len(PHOTOGRAPHS),
        )
    process_state().wait_for_everyone()
    return _measure(preset, model, options, out, inception, [reference], show_progress)


def plan(name: str, options: Options, *, out: Path | str) -> Plan:
    """Estimate the sampling run and list the files that are missing. Nothing is run, downloaded or hashed."""
    _, preset = published_preset(name)
    model = find_model(preset.name, variant=options.variant)
    config = _run_config(options, model)
    model.check(config)
    needed = [] if options.stand_in else files(name, options)
    missing = [s.artifact for s in needed if s.state == "missing"]
    return plan_sampling(model, config, out, dtype=options.dtype, missing=missing, folder=options.folder)


def files(name: str, options: Options) -> list[Status]:
    """Return the state of each file that a row needs. Nothing is read or downloaded."""
    return artifacts.status(needed_files(name, options), folder=_folder(options), given=_given(name, options))


def _given(name: str, options: Options) -> dict[str, Path | None]:
    """Return the files that the user named, by key."""
    system, preset = published_preset(name)
    weights = options.weights
    is_pipeline = weights is not None and (weights / PIPELINE_FILE).is_file()  # it holds the tokenizer too
    return {
        preset.name: weights,
        system.tokenizer.key: options.vae or (weights if is_pipeline else None),
        artifacts.INCEPTION: options.inception,
        artifacts.STATISTICS: options.reference,
        artifacts.REFERENCE_BATCH: options.reference_batch,
    }


def _folder(options: Options) -> Path | None:
    """Return the folder of published files, which is that of the weights if the user named no other."""
    if options.folder is None and artifacts.FOLDER_VARIABLE not in os.environ and options.weights is not None:
        return options.weights if options.weights.is_dir() else None
    return options.folder


def _run_config(options: Options, model: NamedModel) -> RunConfig:
    """Return the configuration of the sampling run."""
    if options.labels not in (None, "balanced", "random"):
        raise UserError(f"The labels must be balanced or random here, not {options.labels!r}.")
    return RunConfig(
        options.images_or(STAND_IN_IMAGES if options.stand_in else NUM_IMAGES),
        model.labels if options.labels is None else "random" if options.labels == "random" else None,
        options.seed,
        options.randomness or "per-image",
        options.batch_size or BATCH_SIZE,
    )


def judge(preset: Preset, results: Results) -> Judged:
    """Compare the row with the paper, if it has the paper's number of images and Inception weights."""
    return judge_published(results, {f"table3/{preset.name}": published_row(preset)}, NUM_IMAGES)


@dataclass(frozen=True)
class Scored:
    """The scores of a row."""

    scores: tuple[Score, ...]
    not_run: list[str]  # the scores that were not measured, with the reasons
    data_sha256: dict[str, str]  # the hashes of samples and references


def score(
    samples: Path | str,
    references: Sequence[Path],
    *,
    inception: Inception,
    num_images: int,
    num_bootstrap: int = 100,
    batch_size: int = 64,
    cache: Path | str,
) -> Scored:
    """Score samples against each reference. If two references give a score, that of the first one counts.

    It raises the errors of `evaluate`.

    Args:
        samples: a folder of images or an .npz, as `evaluate` takes it.
        references: at least one reference, as `evaluate` takes it.
        inception: torch-fidelity's Inception.
        num_images: the number of samples. Scores of 50,000 carry the paper's names; those of fewer are labelled.
        num_bootstrap: the number of resamples behind the interval of FID.
        batch_size: images per forward pass.
        cache: the folder of cached features.
    """
    scores: dict[str, Score] = {}  # by metric
    not_run: dict[tuple[str, ...], str] = {}
    hashes: dict[str, str] = {}
    for reference in references:
        evaluated = evaluate(
            [samples],
            reference,
            inception=inception,
            allow_few=num_images < NUM_IMAGES,
            # The interval belongs to the FID that is compared, which is the first reference's.
            num_bootstrap=num_bootstrap if reference == references[0] else 0,
            batch_size=batch_size,
            cache=cache,
        )
        (scored,) = evaluated.sets
        scores = {score.metric: score for score in scored.scores} | scores
        not_run |= evaluated.not_run
        hashes |= evaluated.data_sha256
    absent = [f"{', '.join(names)}: {why}" for names, why in not_run.items() if not scores.keys() >= set(names)]
    # The paper's table has these scores, and they are compared only if there are as many images.
    papers = SCORES if num_images == NUM_IMAGES and inception.published else ()
    named = (replace(score, num_images=num_images) if score.metric in papers else score for score in scores.values())
    return Scored(tuple(named), absent, hashes)


def published_row(preset: Preset) -> Row:
    """Return the published numbers of a preset, from the paper's table or its README, as a row of results."""
    row = f"table3/{preset.name}"
    return Row(id=row, label=preset.name, metrics=published_metrics(row))


def to_markdown(preset: Preset, results: Results, judged: Judged) -> str:
    """Return the row beside the paper's, with the verdict, tolerances and the source of the numbers."""
    p, published = results.provenance, published_row(preset)
    lines = [f"# Table 3, {preset.name}: {results.scale}", ""]
    lines += [f"{measured_by(p)}. Published: {p.settings['published']}.", ""]
    row = results.rows[0]
    body = [[escape(name), cell(row, name), cell(published, name)] for name in row.metrics]
    lines += [*markdown_table(["", "measured", "published"], body), ""]
    verdict, why = judged[row.id]
    lines += [f"**{verdict}**: {escape(why)}.", ""]
    lines += [f"- {note}" for note in p.settings["notes"]]
    for reason in p.settings["not run"]:
        lines += [f"- not run: {escape(reason)}"]
    names = [name for name in row.metrics if name in published.metrics]
    return "\n".join([*lines, *(["", *tolerance_lines(names)] if names else [])])


def _measure(
    preset: Preset,
    model: NamedModel,
    options: Options,
    out: Path,
    inception: Path,
    references: list[Path],
    show_progress: bool,
) -> tuple[Results, Judged] | None:
    """Sample, score against each reference, and write the results."""
    stopwatch = provenance.Stopwatch()
    config, state, is_stand_in = _run_config(options, model), process_state(), options.stand_in
    model.check(config)
    # The files that the scores need are loaded before the hours of sampling, not after, and so is the target tried.
    make_folder(out, "results.json", "tables.md", "grid.png")
    network = load_inception(inception, allow_other=is_stand_in)
    if state.is_main_process:
        for reference in references:
            load_reference(reference, network, cache=out / "features")
    done = sample_model(
        model,
        config,
        out / "samples",
        overview=out / "grid.png",
        dtype=options.dtype,
        compiled=options.compiled,
        stand_in=is_stand_in,
        show_progress=show_progress,
    )
    sampler, report = done.sampler, done.report
    if not state.is_main_process:
        return None
    described = sampler.describe()
    num_bootstrap = NUM_BOOTSTRAP if options.num_bootstrap is None else options.num_bootstrap
    scored = score(
        report.samples,
        references,
        inception=network,
        num_images=config.num_images,
        num_bootstrap=min(num_bootstrap, STAND_IN_BOOTSTRAP) if is_stand_in else num_bootstrap,
        cache=out / "features",
    )
    scores = [Score("images", config.num_images), *scored.scores, Score("parameters", preset.num_parameters)]
    if report.num_made:
        scores.append(Score("seconds per image", report.seconds / report.num_made))
    results = Results(
        scale=STAND_IN if is_stand_in else "paper",
        provenance=Provenance(
            **stopwatch.record(),
            seed=options.seed,
            data_sha256=scored.data_sha256,
            weights_sha256={
                **({} if is_stand_in else described["weights"]),
                "inception": network.sha256,
            },
            settings={
                "num_images": config.num_images,
                "published Inception weights": network.published,
                "sampler": json.loads(json.dumps(described)),
                "randomness": config.randomness,
                "labels": config.labels or "balanced",
                "published": model.system.evaluation.published,
                "notes": list(model.system.evaluation.notes),
                "run": to_jsonable_python(report),
                "not run": scored.not_run,
            },
        ),
        rows=[Row(id=f"table3/{preset.name}", label=sampler.name, metrics=to_metrics(scores))],
        trends=[],
    )
    judged = judge(preset, results)
    (out / "tables.md").unlink(missing_ok=True)  # a kill must not leave the page of other results beside these
    write(out / "results.json", results)
    write_text(out / "tables.md", to_markdown(preset, results, judged))
    return results, judged
