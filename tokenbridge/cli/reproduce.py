"""`tokenbridge reproduce` and its kin."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.markup import escape

from tokenbridge.cli.options import Data, Json, ScaleName, app, find_scale
from tokenbridge.utils import files
from tokenbridge.utils.console import colored, print_line, print_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@app.command()
def reproduce(
    scale: ScaleName = "tiny",
    weights: Annotated[Path | None, typer.Option(help="Folder of models; the shipped ones by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where tables and pictures go; runs/SCALE by default.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Results to compare with; the shipped ones by default.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Samples of each system.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Rebuild the paper's tables at one scale and compare every row with the stored results."""
    from tokenbridge.reproduction.small_scale import reproduce as run
    from tokenbridge.results.compare import verdicts

    chosen = find_scale(scale, data)
    shipped = files.reference_folder() / scale
    out = out or Path("runs") / scale
    if reference is None and (shipped / "results.json").is_file():
        reference = shipped / "results.json"
    measured, stored = run(
        chosen,
        weights=weights or shipped / "weights",
        out=out,
        reference=reference,
        num_images=num_images,
        seed=seed,
    )
    judged = verdicts(measured, stored)
    if as_json:
        verdict_list = [{"id": id_, "verdict": verdict, "why": why} for id_, (verdict, why) in judged.items()]
        print(json.dumps({**measured.model_dump(), "verdicts": verdict_list}, indent=2))
    else:
        _print_results(measured, judged, out)
    if any(verdict == "not reproduced" for verdict, _ in judged.values()):
        sys.exit(1)


def _print_results(measured: Any, judged: Mapping[str, tuple[str, str]], out: Path) -> None:
    from tokenbridge.results.markdown import TITLES, TREND_COLUMNS, cell, columns_of, tables, trend_cells
    from tokenbridge.results.verdicts import VERDICTS

    for table, rows in tables(measured).items():
        columns = columns_of(rows)
        body = []
        for row in rows:
            verdict, _ = judged[row.id]
            body.append([escape(row.label), *[cell(row, c) for c in columns], colored(verdict)])
        print_table(TITLES.get(table, table), ["", *columns, "verdict"], body)
    trends = [trend_cells(trend) for trend in measured.trends]
    print_table("The paper's argument at this scale", TREND_COLUMNS, trends)
    for id_, (verdict, why) in judged.items():
        if verdict not in ("reproduced", "not compared"):
            print_line(f"{id_}: {verdict}: {why}")
    counts = {v: sum(1 for verdict, _ in judged.values() if verdict == v) for v in VERDICTS}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    print_line(f"{summary}. Tables and pictures are in {out}/.")


@app.command()
def discrepancies(
    scale: ScaleName = "tiny",
    weights: Annotated[Path | None, typer.Option(help="Folder of models; the shipped ones by default.")] = None,
    out: Annotated[Path, typer.Option(help="Where the table and the numbers go.")] = Path("runs/discrepancies"),
    latents: Annotated[
        Path | None, typer.Option(help="Real latents to quantise too: .npz with an array `latents`.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Samples of each seed.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="The first of three.")] = 0,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Measure what each discrepancy between the paper and its code does, both sides in one run."""
    from tokenbridge.reproduction.discrepancies import run as study
    from tokenbridge.results.markdown import TREND_COLUMNS, cell, columns_of, trend_cells

    measured = study.measure_discrepancies(
        find_scale(scale, data),
        weights=weights or files.reference_folder() / scale / "weights",
        out=out,
        latents=latents,
        num_images=num_images,
        seed=seed,
    )
    if as_json:
        print(json.dumps(measured.model_dump(), indent=2))
        return
    for title, rows in study.by_comparison(measured).items():
        ran = [row for row in rows if row.not_run is None]
        columns = columns_of(ran)
        if ran:
            print_table(title, ["", *columns], [[escape(r.label), *[cell(r, c) for c in columns]] for r in ran])
        for row in rows:
            if row.not_run is not None:
                print_line(f"{row.id}: not run: {row.not_run}")
    print_table("Within the seeds' noise?", TREND_COLUMNS, [trend_cells(trend) for trend in measured.trends])
    print(f"Tables and numbers are in {out}/.")


@app.command()
def reproduce_table1(
    num_images: Annotated[int | None, typer.Option(help="In all; 50,000 by default, as published.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 50,
    imagenet: Annotated[Path | None, typer.Option(help="ImageNet: folder with train/, or Parquet files.")] = None,
    vae: Annotated[Path | None, typer.Option(help="kl16.ckpt.")] = None,
    inception_weights: Annotated[Path | None, typer.Option(help="torch-fidelity's Inception weights.")] = None,
    other_inception: Annotated[
        Path | None, typer.Option(help="Other Inception weights; scores are labelled and not compared.")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="adm_in256_stats.npz.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Holds the files; $TOKENBRIDGE_ARTIFACTS by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for tables and numbers.")] = Path("runs/table1"),
    seed: Annotated[int, typer.Option(min=0, help="Of the posterior samples.")] = 0,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what a run takes and what is missing; run nothing.")
    ] = False,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Prove the path with random weights on photographs: no result.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Rebuild the paper's table 1 (reconstruction) with the published VAE on ImageNet, and judge every row."""
    from tokenbridge.reproduction import table1

    wanted = table1.NUM_IMAGES if num_images is None else num_images
    given = {"imagenet": imagenet, "kl16": vae, "inception": inception_weights, "adm-statistics": reference}
    if plan:
        planned = table1.plan(num_images=wanted, folder=folder, given=given, other_inception=other_inception)
        print(json.dumps(planned, indent=2) if as_json else table1.plan_text(planned))
        return
    if stand_in:
        measured, judged = table1.stand_in(out=out, num_images=num_images, seed=seed)
    else:
        measured, judged = table1.reproduce_table1(
            out=out,
            num_images=wanted,
            batch_size=batch_size,
            seed=seed,
            folder=folder,
            given=given,
            other_inception=other_inception,
        )
    if as_json:
        verdict_list = [{"id": id_, "verdict": verdict, "why": why} for id_, (verdict, why) in judged.items()]
        print(json.dumps({**measured.model_dump(), "verdicts": verdict_list}, indent=2))
    else:
        print(table1.to_markdown(measured, judged))
    if any(verdict == "not reproduced" for verdict, _ in judged.values()):
        sys.exit(1)


@app.command()
def reproduce_table3(
    model: Annotated[
        str, typer.Argument(help="A published preset (tokenbridge-l, mar-l), or a system (mar, llamagen, givt ...).")
    ],
    size: Annotated[str | None, typer.Option(help="Of a system: b, l, h, 3b ...; its best known by default.")] = None,
    variant: Annotated[
        str | None, typer.Option(help="Sampling settings: official (default), or paper, unguided, if there are such.")
    ] = None,
    num_images: Annotated[int, typer.Option(help="Only 50,000 are compared with the paper.")] = 50_000,
    weights: Annotated[
        Path | None, typer.Option(help="The model's file, or a folder with it and perhaps the other files.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="The tokenizer's file: kl16.ckpt, vq_ds16_c2i.pt ...")] = None,
    inception: Annotated[
        Path | None, typer.Option("--inception", "--inception-weights", help="torch-fidelity's Inception weights.")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="adm_in256_stats.npz: for FID.")] = None,
    reference_batch: Annotated[
        Path | None, typer.Option(help="VIRTUAL_imagenet256_labeled.npz: for precision and recall.")
    ] = None,
    precision_recall: Annotated[
        bool, typer.Option(help="Measure precision and recall, which need ADM's reference batch.")
    ] = True,
    folder: Annotated[Path | None, typer.Option(help="Holds the files; $TOKENBRIDGE_ARTIFACTS by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/MODEL by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="An image is a function of seed, number and label.")] = 0,
    randomness: Annotated[str, typer.Option(help="per-image, or official: global streams.")] = "per-image",
    labels: Annotated[str | None, typer.Option(help="balanced or random; as published by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time in each process.")] = 64,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; on GPUs as published by default.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile backbone and VAE decoder.")] = False,
    num_bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for FID's interval; 0 for none.")] = 100,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what a run takes and what is missing; run nothing.")
    ] = False,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Full size, weights drawn by a rule, few images: no result.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Rebuild a row of the paper's table 3 from published weights: sample 50,000 images, score them, judge."""
    from tokenbridge.models.registry import published_preset
    from tokenbridge.reproduction import table3
    from tokenbridge.weights.artifacts import FOLDER_VARIABLE

    kind, preset = published_preset(model, size)
    options = table3.Options(
        variant=variant,
        num_images=num_images,
        seed=seed,
        randomness=randomness,
        batch_size=batch_size,
        dtype=dtype,
        compiled=compiled,
        num_bootstrap=num_bootstrap,
        with_precision_recall=precision_recall,
        labels=cast("Any", labels),
    )
    out = out or Path("runs") / f"{preset.name}{'-stand-in' if stand_in else ''}"
    given = {
        preset.name: weights,
        kind.tokenizer.key: vae,
        "inception": inception,
        "adm-statistics": reference,
        "adm-reference": reference_batch,
    }
    if folder is None and FOLDER_VARIABLE not in os.environ and weights is not None and weights.is_dir():
        folder = weights  # the other files may lie there too
    where: dict[str, Any] = {"out": out}
    if plan:
        planned = table3.plan(preset.name, options, folder=folder, given=given, **where)
        if as_json:
            print(json.dumps(planned.as_json(), indent=2))
        else:
            print_table(f"Plan: {planned.name}", ["", ""], planned.rows())
        return
    if stand_in:
        done = table3.stand_in(preset.name, options, **where)
    else:
        done = table3.reproduce_table3(preset.name, options, folder=folder, given=given, **where)
    if done is None:  # not the main process
        return
    measured, judged = done
    if as_json:
        verdict_list = [{"id": id_, "verdict": verdict, "why": why} for id_, (verdict, why) in judged.items()]
        print(json.dumps({**measured.model_dump(), "verdicts": verdict_list}, indent=2))
    else:
        print(table3.to_markdown(preset, measured, judged))
    if any(verdict == "not reproduced" for verdict, _ in judged.values()):
        sys.exit(1)


@app.command()
def reproduce_tables(
    names: Annotated[
        list[str] | None, typer.Argument(help="table1 and presets; all by default.", show_default=False)
    ] = None,
    num_images: Annotated[int, typer.Option(help="Of each model; only 50,000 are compared with the paper.")] = 50_000,
    precision_recall: Annotated[
        bool, typer.Option(help="Measure precision and recall, which need ADM's reference batch.")
    ] = True,
    folder: Annotated[Path | None, typer.Option(help="Holds the files; $TOKENBRIDGE_ARTIFACTS by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for a folder of each.")] = Path("runs/tables"),
    seed: Annotated[int, typer.Option(min=0, help="Of the images.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time in each process.")] = 64,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what the runs take and what is missing; run nothing.")
    ] = False,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Full sizes, weights drawn by a rule, few images: no result.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Rebuild whatever the files that are here allow: table 1, and a row of table 3 for each published model."""
    from tokenbridge.reproduction import paper_scale as tables
    from tokenbridge.reproduction.table3 import Options
    from tokenbridge.utils.devices import process_state

    chosen = tables.check_names(names or [])
    options = Options(num_images=num_images, seed=seed, batch_size=batch_size, with_precision_recall=precision_recall)
    where: dict[str, Any] = {"out": out}
    if plan:
        planned = tables.plan_tables(chosen, options, folder=folder, **where)
        if as_json:
            print(json.dumps(planned, indent=2))
        else:
            _print_table_plans(planned)
        return
    if stand_in:
        outcomes = tables.stand_in_tables(chosen, options, **where)
    else:
        outcomes = tables.reproduce_tables(chosen, options, folder=folder, **where)
    if not process_state().is_main_process:
        return
    if as_json:
        print(json.dumps([outcome.as_json() for outcome in outcomes], indent=2))
    else:
        _print_outcomes(outcomes)
    if any(outcome.verdict == "not reproduced" for outcome in outcomes):
        sys.exit(1)


def _print_table_plans(planned: Sequence[Mapping[str, Any]]) -> None:
    body = []
    for entry in planned:
        plan = entry.get("plan", {})
        hours = f"{plan['estimated_hours_at_least']:,.0f}" if "estimated_hours_at_least" in plan else "–"
        total = plan.get("tflop_per_image", {}).get("total")
        body.append([entry["id"], "–" if total is None else f"{total:.4g}", hours, escape(entry["not_run"] or "ready")])
    print_table("Plan: tables 1 and 3", ["", "TFLOP an image", "hours at least", ""], body)


def _print_outcomes(outcomes: Sequence[Any]) -> None:
    from tokenbridge.results.markdown import cell, columns_of

    columns = [c for c in columns_of([o.published for o in outcomes] + [o.row for o in outcomes]) if c.endswith("-50K")]
    body = []
    for outcome in outcomes:
        cells = [f"{cell(outcome.row, c)} ({cell(outcome.published, c)})" for c in columns]
        verdict = colored(outcome.verdict)
        body.append([escape(outcome.row.id), *cells, verdict, escape(outcome.why)])
    print_table("Tables 1 and 3: measured (published)", ["", *columns, "verdict", "why"], body)
