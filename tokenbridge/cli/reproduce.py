"""`tokenbridge reproduce` and `discrepancies`."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenbridge.cli.options import (
    MAX_BATCH,
    MAX_IMAGES,
    MAX_RESAMPLES,
    MAX_SEED,
    Data,
    DtypeName,
    Json,
    Labels,
    Offline,
    Randomness,
    ScaleName,
    app,
    not_one,
)
from tokenbridge.utils.console import Cell, colored, log, print_line, print_table
from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokenbridge.reproduction.targets import Outcome, Planned


# Options under headings of --help.
file_option = functools.partial(typer.Option, rich_help_panel="Published files")
row_option = functools.partial(typer.Option, rich_help_panel="A row of table 3")


@app.command()
def reproduce(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="tiny (the default) or small; table1; a preset (tokenbridge-l) or a system (mar); several; or all.",
            show_default=False,
            metavar="TARGET",
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what a run takes; exit code 2 if one target's files are missing.")
    ] = False,
    stand_in: Annotated[
        bool,
        typer.Option(
            "--stand-in", help="Prove the path at full size with drawn weights and few images: this is no result."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder for what is made; by default runs/TARGET, or runs/tables of several targets."),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            max=MAX_IMAGES,
            help="The number of images; 2,000 at a scale, else 50,000, which alone are compared with the paper.",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=MAX_SEED, help="The seed; an image is a function of the seed, its number and its label."
        ),
    ] = 0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=MAX_BATCH, help="The number of images at a time in each process.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="The folder of a scale's models; or a model's file, or a folder with it and perhaps the others."
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="The results to compare a scale with; or adm_in256_stats.npz, for FID."),
    ] = None,
    data: Data = None,
    folder: Annotated[
        Path | None,
        file_option(help="The folder of the published files; $TOKENBRIDGE_ARTIFACTS by default."),
    ] = None,
    imagenet: Annotated[
        Path | None,
        file_option(help="ImageNet for table 1: a folder with train/, or Parquet files."),
    ] = None,
    vae: Annotated[Path | None, file_option(help="The tokenizer's file: kl16.ckpt, vq_ds16_c2i.pt ...")] = None,
    inception: Annotated[
        Path | None,
        file_option("--inception", "--inception-weights", help="torch-fidelity's Inception weights."),
    ] = None,
    other_inception: Annotated[
        Path | None,
        file_option(help="Other Inception weights, for table 1; the scores are labelled and not compared."),
    ] = None,
    reference_batch: Annotated[
        Path | None,
        file_option(help="VIRTUAL_imagenet256_labeled.npz: for precision and recall."),
    ] = None,
    precision_recall: Annotated[
        bool, row_option(help="Measure precision and recall, which need ADM's reference batch.")
    ] = True,
    size: Annotated[
        str | None,
        row_option(help="The size of a system: b, l, h, 3b ...; by default the best that was published."),
    ] = None,
    variant: Annotated[
        str | None,
        row_option(
            help="Which of a preset's settings: official (the default); some presets have paper or unguided too.",
        ),
    ] = None,
    randomness: Annotated[
        Randomness | None,
        row_option(help="Random numbers of each image's own stream (the default), or of the official global streams."),
    ] = None,
    labels: Annotated[
        Labels | None, row_option(help="How classes are chosen; by default as in the published evaluation.")
    ] = None,
    dtype: Annotated[
        DtypeName | None,
        row_option(help="By default as in the published evaluation on GPUs, and fp32 elsewhere."),
    ] = None,
    compiled: Annotated[bool, row_option("--compile", help="Compile the backbone and the VAE's decoder.")] = False,
    num_bootstrap: Annotated[
        int | None,
        row_option(
            min=0,
            max=MAX_RESAMPLES,
            callback=not_one,
            help="The number of resamples behind FID's interval; 100 by default, and 0 leaves it out.",
        ),
    ] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Rebuild the paper's tables and judge every row.

    At a scale (tiny, small) all tables, by models that were trained here; at the paper's scale table 1, or the row of
    a published model in table 3. Of several targets, and of all, those are run whose files are present.
    """
    from tokenbridge.reproduction import targets as t
    from tokenbridge.reproduction.options import Options

    names = targets or ["tiny"]
    options = Options(
        num_images=num_images,
        seed=seed,
        batch_size=batch_size,
        stand_in=stand_in,
        data=data,
        weights=weights,
        reference=reference,
        folder=folder,
        imagenet=imagenet,
        vae=vae,
        inception=inception,
        other_inception=other_inception,
        reference_batch=reference_batch,
        precision_recall=precision_recall,
        size=size,
        variant=variant,
        randomness=randomness,
        labels=labels,
        dtype=dtype,
        compiled=compiled,
        num_bootstrap=num_bootstrap,
    )
    several = t.are_several(names)
    if plan:
        planned = t.plan(names, options, out=out)
        if as_json:
            print(json.dumps([each.as_json() for each in planned] if several else planned[0].plan, indent=2))
        elif several:
            _print_plans(planned)
        else:
            print_table(f"Plan: {planned[0].name}", ["", ""], planned[0].rows)
        if not several and planned[0].not_run is not None:  # of several, those run that can be
            sys.exit(2)
        return
    done = t.reproduce(names, options, out=out)
    if not done:  # in all processes but the main one
        return
    if several:
        outcomes = t.outcomes(done)
        if as_json:
            print(json.dumps([outcome.as_json() for outcome in outcomes], indent=2))
        else:
            _print_outcomes(outcomes)
    elif as_json:
        print(json.dumps(done[0].as_json(), indent=2))
    elif done[0].target.group == "scale":
        _print_results(done[0].results, done[0].judged, done[0].out)
    else:
        print_line((done[0].out / "tables.md").read_text(encoding="utf-8").rstrip("\n"))
    if any(each.failed for each in done):
        sys.exit(1)


def _hide_alias(old: str, target: str | None) -> None:
    """Keep an old command for one release; `target` is what it reproduces where its arguments name nothing."""

    @functools.wraps(reproduce)
    def run(**arguments: Any) -> None:
        log(f"`tokenbridge {old}` is now `tokenbridge reproduce {target or 'MODEL'}`, and goes with the next release.")
        implied = [target] if target is not None and not arguments["targets"] else []
        if not (implied or arguments["targets"]):
            raise UserError("Name a model: `tokenbridge reproduce MODEL`.")
        # Results name the command that made them: let it be one that the next release has.
        sys.argv[1:2] = ["reproduce", *implied]
        reproduce(**{**arguments, "targets": arguments["targets"] or implied})

    app.command(old, hidden=True)(run)


_hide_alias("reproduce-table1", "table1")
_hide_alias("reproduce-table3", None)
_hide_alias("reproduce-tables", "all")


def _print_results(measured: Any, judged: Mapping[str, tuple[str, str]], out: Path) -> None:
    from tokenbridge.results.markdown import TITLES, TREND_COLUMNS, cell, columns_of, tables, trend_cells
    from tokenbridge.results.verdicts import VERDICTS

    for table, rows in tables(measured).items():
        columns = columns_of(rows)
        body: list[list[Cell]] = []
        for row in rows:
            verdict, _ = judged[row.id]
            body.append([row.label, *[cell(row, c) for c in columns], colored(verdict)])
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
    weights: Annotated[Path | None, typer.Option(help="The folder of models; the shipped ones by default.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for the table and the numbers.")] = Path("runs/discrepancies"),
    latents: Annotated[
        Path | None, typer.Option(help="Real latents to quantise too, as an .npz file with the array latents.")
    ] = None,
    num_images: Annotated[int, typer.Option(max=MAX_IMAGES, help="The number of samples of each seed.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="The first of three seeds.")] = 0,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Measure what each discrepancy between the paper and its code does, both sides in one run."""
    from tokenbridge.configs.scales import find_scale
    from tokenbridge.reproduction.discrepancies import run as study
    from tokenbridge.results.markdown import TREND_COLUMNS, cell, columns_of, trend_cells

    measured = study.measure_discrepancies(
        find_scale(scale, data),
        weights=weights,
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
            print_table(title, ["", *columns], [[r.label, *[cell(r, c) for c in columns]] for r in ran])
        for row in rows:
            if row.not_run is not None:
                print_line(f"{row.id}: not run: {row.not_run}")
    print_table("Within the seeds' noise?", TREND_COLUMNS, [trend_cells(trend) for trend in measured.trends])
    print_line(f"Tables and numbers are in {out}/.")


def _print_plans(planned: Sequence[Planned]) -> None:
    from tokenbridge.sampling.plan import hours_in_words

    body: list[list[Cell]] = []
    for each in planned:
        plan = each.plan or {}
        hours = hours_in_words(plan["estimated_hours_at_least"]) if "estimated_hours_at_least" in plan else "–"
        total = plan.get("tflop_per_image", {}).get("total")
        body.append([each.id, "–" if total is None else f"{total:.4g}", hours, each.not_run or "ready"])
    print_table("Plan: tables 1 and 3", ["", "TFLOP an image", "hours at least", ""], body)


def _print_outcomes(outcomes: Sequence[Outcome]) -> None:
    from tokenbridge.results.markdown import cell, columns_of
    from tokenbridge.results.score import NUM_IMAGES, read_name

    names = columns_of([o.published for o in outcomes] + [o.row for o in outcomes])
    columns = [name for name in names if read_name(name).num_images == NUM_IMAGES]
    body: list[list[Cell]] = []
    for outcome in outcomes:
        cells = [f"{cell(outcome.row, c)} ({cell(outcome.published, c)})" for c in columns]
        verdict = colored(outcome.verdict)
        body.append([outcome.row.id, *cells, verdict, outcome.why])
    print_table("Tables 1 and 3: measured (published)", ["", *columns, "verdict", "why"], body)
