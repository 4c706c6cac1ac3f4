"""The command `tokenbridge`: progress on stderr, results on stdout, as a table or with `--json`.

Exit codes: 0 done and, where something is judged, reproduced; 1 not reproduced; 2 could not be done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenbridge.files import reference_folder as reference_folder
from tokenbridge.provenance import EnvironmentProblemError, check_environment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokenbridge.recipes import Scale

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Check whether the published numbers of TokenBridge and its baselines hold.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
Data = Annotated[
    str | None, typer.Option(help="Images to use instead of the scale's: a folder, Parquet, or a hub name.")
]
ScaleName = Annotated[str, typer.Argument(help="Which scale: tiny (digits) or small (CIFAR-10).")]


def main() -> None:
    """Run the command; every user error is one message on stderr and exit code 2."""
    try:
        check_environment()
        app()
    except (EnvironmentProblemError, ValueError, OSError, FloatingPointError) as error:
        console = Console(stderr=True, soft_wrap=True)
        console.print("[bold red]Error:[/]", end=" ")
        console.print(str(error), highlight=False, markup=False)
        sys.exit(2)


def find_scale(name: str, data: str | None = None) -> Scale:
    """Return the scale called `name`, with its images from `data` if that is given.

    Raises:
        ValueError: there is none.
    """
    from tokenbridge.recipes import SCALES

    if name not in SCALES:
        raise ValueError(f"Unknown scale {name!r}; there are {', '.join(SCALES)}.")
    return SCALES[name] if data is None else replace(SCALES[name], data=data)


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
    from tokenbridge.reproduce import reproduce as run
    from tokenbridge.results import verdicts

    chosen = find_scale(scale, data)
    shipped = reference_folder() / scale
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
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    judged = verdicts(measured, stored)
    if as_json:
        verdict_list = [{"id": id_, "verdict": verdict, "why": why} for id_, (verdict, why) in judged.items()]
        print(json.dumps({**measured.model_dump(), "verdicts": verdict_list}, indent=2))
    else:
        _print_results(measured, judged, out)
    if any(verdict == "not reproduced" for verdict, _ in judged.values()):
        sys.exit(1)


_COLOURS = {"reproduced": "green", "not reproduced": "bold red", "not run": "yellow", "not compared": "yellow"}


def _print_results(measured: Any, judged: Mapping[str, tuple[str, str]], out: Path) -> None:
    from tokenbridge.results import TITLES, TREND_COLUMNS, cell, columns_of, tables, trend_cells

    for table, rows in tables(measured).items():
        columns = columns_of(rows)
        body = []
        for row in rows:
            verdict, _ = judged[row.id]
            body.append([escape(row.label), *[cell(row, c) for c in columns], f"[{_COLOURS[verdict]}]{verdict}[/]"])
        _print_table(TITLES.get(table, table), ["", *columns, "verdict"], body)
    trends = [trend_cells(trend) for trend in measured.trends]
    _print_table("The paper's argument at this scale", TREND_COLUMNS, trends)
    console = Console(soft_wrap=True)
    for id_, (verdict, why) in judged.items():
        if verdict not in ("reproduced", "not compared"):
            console.print(f"{id_}: {verdict}: {why}", highlight=False, markup=False)
    counts = {v: sum(1 for verdict, _ in judged.values() if verdict == v) for v in _COLOURS}
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    console.print(f"{summary}. Tables and pictures are in {out}/.", highlight=False, markup=False)


_NUMERIC = "–-+.0123456789"  # what the cells of a column of numbers start with


def _print_table(title: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(header))
    for i, name in enumerate(header):
        numbers = i > 0 and all(line[i][:1] in _NUMERIC for line in body)  # "" is in every text
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for line in body:
        table.add_row(*line)
    # Not cut to 80 columns where the output goes to a file or a log.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


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
    from tokenbridge import discrepancies as study
    from tokenbridge.results import TREND_COLUMNS, cell, columns_of, trend_cells

    measured = study.measure_discrepancies(
        find_scale(scale, data),
        weights=weights or reference_folder() / scale / "weights",
        out=out,
        latents=latents,
        num_images=num_images,
        seed=seed,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if as_json:
        print(json.dumps(measured.model_dump(), indent=2))
        return
    console = Console(soft_wrap=True)
    for title, rows in study.by_comparison(measured).items():
        ran = [row for row in rows if row.not_run is None]
        columns = columns_of(ran)
        if ran:
            _print_table(title, ["", *columns], [[escape(r.label), *[cell(r, c) for c in columns]] for r in ran])
        for row in rows:
            if row.not_run is not None:
                console.print(f"{row.id}: not run: {row.not_run}", highlight=False, markup=False)
    _print_table("Within the seeds' noise?", TREND_COLUMNS, [trend_cells(trend) for trend in measured.trends])
    print(f"Tables and numbers are in {out}/.")


@app.command()
def sample(
    model: Annotated[
        str,
        typer.Argument(help="A preset (tokenbridge-l, mar-l ...), SCALE/RECIPE (tiny/mar), or a path and --preset."),
    ] = "tokenbridge-tiny",
    preset: Annotated[str | None, typer.Option(help="Which model is at the path MODEL.")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Of a preset: checkpoint, its folder, or converted; of a scale: its folder of models."),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(help="The tokenizer's file (kl16.ckpt, vq_ds16_c2i.pt ...) or a diffusers folder.")
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="How many; 100, or as many as labels, by default.")] = None,
    label: Annotated[int | None, typer.Option(help="One class for all images.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="A class for each image (3,7,7), balanced or random; by default as published: mostly balanced."
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Of a preset's settings: official (default), or paper, unguided, if it has them.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is no guidance; the model's own by default.")] = None,
    guidance_weight: Annotated[float | None, typer.Option(help="Of GIVT; 0 is no guidance.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of LlamaGen; 0 keeps all codes.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of LlamaGen; 1 keeps all codes.")] = None,
    num_diffusion_steps: Annotated[str | None, typer.Option(help="Of MAR: a number, or another spacing.")] = None,
    num_iterations: Annotated[int | None, typer.Option(help="At most the number of positions.")] = None,
    position_order: Annotated[str | None, typer.Option(help="random, raster or confidence.")] = None,
    first_element: Annotated[str | None, typer.Option(help="Of the AR head: official or training-consistent.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="An image is a function of seed, number and label.")] = 0,
    randomness: Annotated[str, typer.Option(help="per-image, or official: global streams.")] = "per-image",
    batch_size: Annotated[int, typer.Option(help="Images at a time in each process.")] = 16,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; by default as published for such models on GPUs, else fp32.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile backbone and VAE decoder.")] = False,
    file_format: Annotated[str, typer.Option("--format", help="png: a folder; npz: one file as ADM reads.")] = "png",
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/MODEL-samples by default.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would take, and do nothing.")] = False,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Weights drawn by a rule, few images and iterations: no result.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Generate images, in one process or under torchrun; a run that was killed goes on where it was."""
    from tokenbridge.plan import plan_run
    from tokenbridge.run import RunConfig, process_state, sampling_run, save_overview
    from tokenbridge.systems import STAND_IN_IMAGES, find_system, with_artifacts

    system = find_system(model, shipped=reference_folder(), preset=preset, variant=variant, weights=weights, vae=vae)
    if stand_in:
        system = system.for_stand_in()
        if num_images is None and labels in (None, "balanced", "random"):
            num_images = STAND_IN_IMAGES
    steps = num_diffusion_steps
    given = {
        "guidance_scale": guidance_scale,
        "guidance_weight": guidance_weight,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_diffusion_steps": int(steps) if steps is not None and steps.isdecimal() else steps,
        "num_iterations": num_iterations,
        "position_order": position_order,
        "first_element": first_element,
    }
    system = system.sampled(**{key: value for key, value in given.items() if value is not None})
    chosen_labels = system.labels if label is None and labels is None else _labels(label, labels, num_images)
    if num_images is None:
        num_images = len(chosen_labels) if isinstance(chosen_labels, tuple) else 100
    config = RunConfig(
        num_images,
        labels=chosen_labels,
        seed=seed,
        randomness=cast("Any", randomness),
        batch_size=batch_size,
        format=cast("Any", file_format),
    )
    system.check(config)
    out = out or Path("runs") / f"{system.name.replace('/', '-')}-{'stand-in' if stand_in else 'samples'}"
    state = process_state()
    chosen_dtype = system.dtype(dtype, state.device)
    if plan:
        planned = plan_run(
            system,
            config,
            out,
            device=state.device,
            dtype=chosen_dtype,
            num_processes=state.num_processes,
            missing=[] if stand_in else system.missing(),
        )
        if as_json:
            print(json.dumps(planned.as_json(), indent=2))
        else:
            _print_table(f"Plan: {planned.name}", ["", ""], planned.rows())
        return
    if system.is_published and not stand_in:
        system = with_artifacts(system)
    make = system.stand_in if stand_in else system.load
    sampler = make(state.device, dtype=chosen_dtype, compiled=compiled)
    report = sampling_run(sampler, config, out)
    if not state.is_main_process:
        return
    save_overview(out / "grid.png", report.samples, f"{sampler.name}, seed {seed}, {report.num_images} images")
    if as_json:
        print(json.dumps({"folder": str(out), "model": sampler.name, **report.as_json()}, indent=2))
    else:
        print(f"{report.num_images} images ({sampler.name}) are in {report.samples}, an overview in {out}/grid.png.")


def _labels(
    label: int | None, labels: str | None, num_images: int | None
) -> tuple[int, ...] | Literal["random"] | None:
    """Return the labels that the options --label and --labels ask for; None for balanced ones."""
    if label is not None and labels is not None:
        raise ValueError("--label gives one class for all images, --labels one for each: name one of them.")
    if label is not None:
        return (label,) * (100 if num_images is None else num_images)
    if labels is None or labels == "balanced":
        return None
    if labels == "random":
        return "random"
    try:
        return tuple(int(number) for number in labels.split(","))
    except ValueError as error:
        raise ValueError(
            f"Labels are whole numbers separated by commas, balanced or random, not {labels!r}."
        ) from error


@app.command()
def reconstruct(
    source: Annotated[str, typer.Argument(help="Images: a folder, Parquet, digits, cifar10, imagenet or a hub name.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="A diffusers autoencoder: folder or hub name; the tiny VAE by default.")
    ] = None,
    levels: Annotated[str, typer.Option(help="Quantisation levels, separated by commas.")] = "8,16,32,64",
    quantizer: Annotated[str, typer.Option(help="gaussian, uniform or lloyd-max.")] = "gaussian",
    value_range: Annotated[float, typer.Option(help="Latents beyond this size are clamped.")] = 5.0,
    scale: Annotated[str, typer.Option(help="Latent scale: config, measure or a number.")] = "config",
    split: Annotated[str, typer.Option(help="Split of the source.")] = "test",
    image_size: Annotated[int | None, typer.Option(help="Centre-crop to this size.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    inception_weights: Annotated[
        Path | None, typer.Option(help="torch-fidelity's Inception weights, for rFID.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for table and picture.")] = Path("runs/reconstruction"),
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of images under --limit.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure what a tokenizer keeps of images, continuous and quantised: PSNR, SSIM, rFID, bits per image."""
    from tokenbridge.reconstruction import COLUMNS
    from tokenbridge.reconstruction import reconstruct as run
    from tokenbridge.results import cell

    try:
        chosen_levels = [int(level) for level in levels.split(",")]
    except ValueError as error:
        raise ValueError(f"Levels are whole numbers separated by commas, not {levels!r}.") from error
    report = run(
        source,
        tokenizer=tokenizer or str(reference_folder() / "tiny" / "weights" / "vae"),
        out=out,
        levels=chosen_levels,
        quantizer=quantizer,
        value_range=value_range,
        scale=scale if scale in ("config", "measure") else _number(scale, "The scale"),
        split=split,
        image_size=image_size,
        limit=limit,
        batch_size=batch_size,
        inception_weights=inception_weights,
        seed=seed,
    )
    if as_json:
        rows = [row.model_dump() for row in report.rows]
        print(json.dumps({"settings": report.settings, "rows": rows, "notes": report.notes}, indent=2))
        return
    _print_table("Reconstruction", ["", *COLUMNS], [[r.label, *[cell(r, c) for c in COLUMNS]] for r in report.rows])
    for note in report.notes:
        Console(soft_wrap=True).print(note, highlight=False, markup=False)
    print(f"Table and picture are in {out}/.")


@app.command()
def evaluate(
    samples: Annotated[
        list[Path], typer.Argument(help="Folders of images or .npz (arr_0), one for each seed.", show_default=False)
    ],
    reference: Annotated[Path, typer.Option(help="Statistics (.npz: mu, sigma, arr_0), or a folder of images.")],
    inception: Annotated[
        Path | None,
        typer.Option("--inception", "--inception-weights", help="Of torch-fidelity; the usual places by default."),
    ] = None,
    cleanfid_inception: Annotated[
        Path | None, typer.Option(help="clean-fid's inception-2015-12-05.pt, for FID by its own features.")
    ] = None,
    allow_other_inception: Annotated[
        bool, typer.Option("--allow-other-inception", help="Take unpublished weights; scores are labelled.")
    ] = False,
    allow_few: Annotated[
        bool, typer.Option("--allow-few", help="Take fewer than 2,048 images; scores are labelled.")
    ] = False,
    num_bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for FID's interval; 0 for none.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of IS, KID and bootstrap; torch-fidelity's by default.")] = 2020,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    cache: Annotated[Path, typer.Option(help="Folder for features.")] = Path("runs/features"),
    out: Annotated[Path | None, typer.Option(help="Result file to write (JSON).")] = None,
    as_json: Json = False,
) -> None:
    """Score generated images: FID, Inception Score, precision, recall and KID by Inception."""
    from tokenbridge.evaluation import evaluate as run
    from tokenbridge.inception import find_inception
    from tokenbridge.results import cell, columns_of, write

    measured = run(
        samples,
        reference,
        inception=inception or find_inception().path,
        cleanfid_inception=cleanfid_inception,
        allow_other_inception=allow_other_inception,
        allow_few=allow_few,
        num_bootstrap=num_bootstrap,
        seed=seed,
        batch_size=batch_size,
        cache=cache,
    )
    if out is not None:
        write(out, measured)
    if as_json:
        print(json.dumps(measured.model_dump(), indent=2))
        return
    scored = [row for row in measured.rows if row.not_run is None]
    body = [[name, *[cell(row, name) for row in scored]] for name in columns_of(scored)]
    _print_table(f"Evaluation against {reference}", ["", *[row.label for row in scored]], body)
    console = Console(soft_wrap=True)
    for row in measured.rows:
        if row.not_run is not None:
            console.print(f"{row.label}: not run: {row.not_run}.", highlight=False, markup=False)
    for note in measured.provenance.settings["notes"]:
        console.print(note, highlight=False, markup=False)


@app.command()
def reference(
    source: Annotated[str, typer.Argument(help="Images: a folder, Parquet, digits, cifar10, imagenet or a hub name.")],
    out: Annotated[Path, typer.Option(help="File to write (.npz).")],
    split: Annotated[str, typer.Option(help="Split of the source.")] = "train",
    image_size: Annotated[int, typer.Option(min=1, help="Centre-crop to this size, as ADM does.")] = 256,
    keep_images: Annotated[
        int, typer.Option(min=0, help="Store so many of the images too, for precision, recall and KID.")
    ] = 0,
    inception: Annotated[
        Path | None,
        typer.Option("--inception", "--inception-weights", help="Of torch-fidelity; the usual places by default."),
    ] = None,
    allow_other_inception: Annotated[
        bool, typer.Option("--allow-other-inception", help="Take unpublished weights.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of images to keep.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    as_json: Json = False,
) -> None:
    """Make the reference statistics of a data set: mean and covariance of Inception's features."""
    from tokenbridge.evaluation import make_reference
    from tokenbridge.inception import find_inception

    meta = make_reference(
        source,
        out,
        inception=inception or find_inception().path,
        split=split,
        image_size=image_size,
        keep_images=keep_images,
        allow_other_inception=allow_other_inception,
        seed=seed,
        batch_size=batch_size,
    )
    if as_json:
        print(json.dumps(meta, indent=2))
    else:
        print(f"Statistics of {meta['num_images']:,} images are in {out}.")


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{what} is a number, not {text!r}.") from error


@app.command()
def conformance(
    paths: Annotated[list[Path], typer.Argument(help="Golden files (.npz), or folders of them.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Run golden files: numbers of the official code against ours; exit code 1 if any output fails."""
    from tokenbridge.conformance import conformance as run

    if not run(paths, as_json=as_json):
        sys.exit(1)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A published file, or its folder: of a model or a tokenizer.")],
    name: Annotated[str, typer.Argument(help="A preset (`tokenbridge models`), kl16, llamagen-vq16 or givt-vae.")],
    out: Annotated[Path, typer.Option(help="Folder to write: config.json and safetensors.")],
    vae: Annotated[
        Path | None, typer.Option(help="kl16.ckpt, to write a whole pipeline of TokenBridge with its VAE.")
    ] = None,
    ema: Annotated[bool, typer.Option(help="Moving average of the weights, as published; or the last ones.")] = True,
) -> None:
    """Turn a published checkpoint into a diffusers folder, strictly; pickled code in it is never run."""
    if vae is None:
        from tokenbridge.systems import convert as run

        run(checkpoint, out, name, ema=ema)
    else:
        from tokenbridge.pipeline import convert_pipeline

        convert_pipeline(checkpoint, vae, out, name, ema=ema)
    print(f"{name} is in {out}/")


@app.command()
def artifacts(
    keys: Annotated[list[str] | None, typer.Argument(help="Which files; all by default.", show_default=False)] = None,
    folder: Annotated[Path | None, typer.Option(help="Holds the files; $TOKENBRIDGE_ARTIFACTS by default.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash the files that are here, and check them.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch the KEYS that are missing.")] = False,
    accept: Annotated[str | None, typer.Option(help="Record this file's hash anew.", metavar="KEY")] = None,
    as_json: Json = False,
) -> None:
    """Show the published files: missing, present, or verified; exit code 1 if one of KEYS is missing or changed."""
    from tokenbridge import artifacts as files

    if accept is not None:
        files.accept(accept, folder=folder)
    if download:
        if not keys:
            raise ValueError("All files are more than 20: name those to download.")
        files.resolve(keys, folder=folder)
    if verify:
        here = [s.artifact.key for s in files.status(keys, folder=folder) if s.state != "missing"]
        files.resolve(here, folder=folder, download=False)
    listed = files.status(keys, folder=folder)
    if as_json:
        print(json.dumps([status.as_dict() for status in listed], indent=2))
    else:
        _print_artifacts(listed)
    if keys and any(status.state in ("missing", "changed") for status in listed):
        sys.exit(1)


def _print_artifacts(listed: Sequence[Any]) -> None:
    colours = {"verified": "green", "present": "yellow", "changed": "bold red", "missing": "red"}
    body = []
    for status in listed:
        size = f"{status.size / 1e6:,.1f} MB" if status.size is not None else "–"
        sha256 = f"{status.sha256[:12]}…" if status.sha256 else "–"
        where = str(status.path or status.artifact.origin)
        state = f"[{colours[status.state]}]{status.state}[/]"
        body.append([status.artifact.key, state, size, sha256, escape(status.artifact.licence), escape(where)])
    _print_table("Published files", ["", "", "size", "SHA-256", "licence", "path, or origin"], body)


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
    from tokenbridge import table1

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
    from tokenbridge import table3
    from tokenbridge.artifacts import FOLDER_VARIABLE
    from tokenbridge.systems import published_preset

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
    where: dict[str, Any] = {"out": out, "shipped": reference_folder()}
    if plan:
        planned = table3.plan(preset.name, options, folder=folder, given=given, **where)
        if as_json:
            print(json.dumps(planned.as_json(), indent=2))
        else:
            _print_table(f"Plan: {planned.name}", ["", ""], planned.rows())
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
    from tokenbridge import tables
    from tokenbridge.run import process_state
    from tokenbridge.table3 import Options

    chosen = tables.check_names(names or [])
    options = Options(num_images=num_images, seed=seed, batch_size=batch_size, with_precision_recall=precision_recall)
    where: dict[str, Any] = {"out": out, "shipped": reference_folder()}
    if plan:
        planned = tables.plan_tables(chosen, options, folder=folder, **where)
        if as_json:
            print(json.dumps(planned, indent=2))
        else:
            _print_table_plans(planned)
        return
    where["say"] = lambda text: print(text, file=sys.stderr, flush=True)
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
    _print_table("Plan: tables 1 and 3", ["", "TFLOP an image", "hours at least", ""], body)


def _print_outcomes(outcomes: Sequence[Any]) -> None:
    from tokenbridge.results import cell, columns_of

    columns = [c for c in columns_of([o.published for o in outcomes] + [o.row for o in outcomes]) if c.endswith("-50K")]
    body = []
    for outcome in outcomes:
        cells = [f"{cell(outcome.row, c)} ({cell(outcome.published, c)})" for c in columns]
        verdict = f"[{_COLOURS[outcome.verdict]}]{outcome.verdict}[/]"
        body.append([escape(outcome.row.id), *cells, verdict, escape(outcome.why)])
    _print_table("Tables 1 and 3: measured (published)", ["", *columns, "verdict", "why"], body)


@app.command()
def models(as_json: Json = False) -> None:
    """List the models of all systems: size, tokens, source and licence of the weights, published scores, settings."""
    from tokenbridge.systems import list_presets

    listed = list_presets()
    if as_json:
        print(json.dumps([listing.as_json() for listing in listed], indent=2))
        return
    body = []
    for listing in listed:
        scores = [f"{listing.published[name]:g}" if name in listing.published else "–" for name in ("FID", "IS")]
        settings = next(iter(listing.settings.values()), {})
        shown = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items() if k != "source" and v is not None)
        tokens = f"{listing.num_tokens:,}: {listing.token}"
        parameters = f"{listing.num_parameters:,}"
        source, licence = escape(listing.source), escape(listing.licence)
        body.append([listing.name, parameters, tokens, *scores, shown or "not published", licence, source])
    header = ["", "parameters", "tokens of an image", "FID", "IS", "settings", "licence", "weights"]
    _print_table("Models, and what was published of them (50,000 images, ImageNet 256 x 256)", header, body)


@app.command()
def train(
    scale: ScaleName = "tiny",
    names: Annotated[list[str] | None, typer.Argument(help="Which recipes; all of the scale by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where weights and logs go; runs/SCALE-training by default.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Models at a time; one per core on a CPU.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Train the models of a scale from nothing; a run that was killed goes on where it was."""
    import torch

    from tokenbridge.experiment import latents_of, train_recipe

    chosen = find_scale(scale, data)
    out = out or Path("runs") / f"{scale}-training"
    recipes = [chosen.recipe(name) for name in names] if names else [r for r in chosen.recipes if not r.optional]
    if not torch.cuda.is_available():
        # One thread a model: sums are then added in one order whatever the number of cores, so that a seed gives
        # the same weights, and two models side by side use two cores better than one model does.
        torch.set_num_threads(1)
        jobs = jobs or os.cpu_count() or 1
    if len(recipes) == 1:
        log = train_recipe(chosen, recipes[0].name, weights=out / "weights", runs=out)
        final_loss = log["loss"][-1][1]
        if as_json:
            print(json.dumps(log))
        else:
            print(f"{recipes[0].name}: loss {final_loss:.4f} after {log['seconds']:.0f} s, in {out / 'weights'}/")
        return
    # Generators need a tokenizer, so they come second.
    for stage in ([r for r in recipes if not r.is_generator], [r for r in recipes if r.is_generator]):
        if any(recipe.is_generator for recipe in stage):
            latents_of(chosen, out / "weights", out / "latents")  # once, before several processes want them
        with ThreadPoolExecutor(max_workers=jobs or 1) as pool:
            options = ["--out", str(out), *(["--data", data] if data else []), *(["--json"] if as_json else [])]
            commands = [["train", scale, recipe.name, *options] for recipe in stage]
            if failed := [code for code in pool.map(_run_self, commands) if code]:
                raise ValueError(f"{len(failed)} of {len(stage)} trainings failed; their messages are above.")


def _run_self(arguments: Sequence[str]) -> int:
    """Run this command in a process of its own, passing on what it says line by line."""
    command = [sys.executable, "-m", "tokenbridge", *arguments]
    with subprocess.Popen(command, stdout=sys.stdout, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
    return process.returncode


@app.command()
def gate(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="goldens, tiny, tokens, audit, benchmarks; all by default.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out sampling in `tiny`, and the benchmarks.")] = False,
    references: Annotated[Path | None, typer.Option(help="What is compared with; the shipped ones by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for what is made, and for junit.xml.")] = Path("runs/gate"),
) -> None:
    """Compare this code with all stored references; exit code 1 if anything changed, 2 if a part could not be run."""
    from tokenbridge import gate as g

    chosen = parts or g.PARTS
    done = g.run_gate(find_scale("tiny"), references or reference_folder(), out, parts=chosen, quick=quick)
    g.write_junit(out / "junit.xml", done)
    g.print_parts(done)
    sys.exit(g.exit_code(done))


@app.command()
def update_references(
    parts: Annotated[
        list[str] | None, typer.Argument(help="tiny, verdicts, benchmarks; all by default.", show_default=False)
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Replace the stored references by the measured ones.")] = False,
    why: Annotated[str, typer.Option(help="Why they change; asked for by --write.")] = "",
    references: Annotated[Path | None, typer.Option(help="What is replaced; the shipped ones by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for what is measured.")] = Path("runs/references"),
) -> None:
    """Measure the references anew and show what differs; with --write and --why, replace them and record it."""
    from tokenbridge import references as r

    folder = references or reference_folder()
    changes = r.update(find_scale("tiny"), folder, out, parts=parts or r.PARTS, why=why if write else None)
    _print_table("Stored references against new ones", r.COLUMNS, [[escape(c) for c in change] for change in changes])
    print(f"{folder} is updated; the record is in {folder / r.RECORD}." if write else "Nothing was written.")


@app.command()
def audit(
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Result files (results.json), own or others', beside the shipped ones; those in runs/ by default.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Folder of images, or .npz, to score and to judge --claim by.")
    ] = None,
    claim: Annotated[str | None, typer.Option(help="With --samples: a claim of table 3, by its id.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page, Markdown, JSON and JUnit XML.")] = Path("runs/audit"),
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            help="What gives exit code 1: worse than stored (the default), or a verdict, as 'not reproduced'.",
            show_default=False,
        ),
    ] = None,
    accept: Annotated[
        str | None, typer.Option(help="Store today's verdicts as the expected ones, for this reason.", metavar="REASON")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Models behind RESULTS, if not the shipped ones.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Holds the files; $TOKENBRIDGE_ARTIFACTS by default.")] = None,
    inception: Annotated[
        Path | None,
        typer.Option("--inception", "--inception-weights", help="With --samples: torch-fidelity's Inception weights."),
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="With --samples: adm_in256_stats.npz, for FID.")] = None,
    reference_batch: Annotated[
        Path | None, typer.Option(help="With --samples: VIRTUAL_imagenet256_labeled.npz, for precision and recall.")
    ] = None,
    other_inception: Annotated[
        Path | None, typer.Option(help="With --samples: other Inception weights; scores are labelled, decide nothing.")
    ] = None,
    num_bootstrap: Annotated[int, typer.Option(min=0, help="With --samples: resamples for FID's interval.")] = 100,
    as_json: Json = False,
) -> None:
    """Judge every published number by what was measured: verdicts, evidence, a page; exit code 1 if the gate fails."""
    from tokenbridge.audit import WORSE, audit_samples, write_expected
    from tokenbridge.audit import audit as run
    from tokenbridge.audit_report import write_report
    from tokenbridge.results import cell

    if (samples is None) != (claim is None) or (samples is not None and (results or accept)):
        raise ValueError("--samples and --claim go together, without result files and without --accept.")
    if accept is not None and not accept.strip():
        raise ValueError("Verdicts are accepted for a reason: give one.")
    shipped, failing = reference_folder(), fail_on or ([] if accept is not None else [WORSE])
    if samples is not None:
        assert claim is not None
        done = audit_samples(
            samples,
            claim,
            out=out,
            shipped=shipped,
            folder=folder,
            given={"inception": inception, "adm-statistics": reference, "adm-reference": reference_batch},
            other_inception=other_inception,
            num_bootstrap=num_bootstrap,
            fail_on=failing,
        )
    else:
        done = run(results or [], shipped=shipped, weights=weights, folder=folder, fail_on=failing)
    tiny = [Path(e.file).parent for e in done.evidence if any(t.id == "right-class" for t in e.trends)]
    own = next((path for path in tiny if path != Path("reference_results/tiny")), None)
    write_report(done, out, reference=shipped, runs=own)
    if accept is not None:
        write_expected(shipped / "paper" / "expected.json", done, accept)
    if as_json:
        print(done.model_dump_json(indent=2))
    else:
        if samples is not None:
            (row,) = done.evidence[-1].rows
            _print_table(f"Scores of {samples}", ["", row.label], [[name, cell(row, name)] for name in row.metrics])
        _print_audit(done, out)
    if done.failures:
        sys.exit(1)


def _print_audit(done: Any, out: Path) -> None:
    from tokenbridge.audit_report import counts, lines_of

    _print_table("Published claims", ["verdict", "claims"], [[verdict, str(n)] for verdict, n in counts(done).items()])
    console = Console(soft_wrap=True)
    for evidence in done.evidence:
        console.print(f"Evidence: {evidence.file}: {'; '.join(evidence.notes)}.", highlight=False, markup=False)
    for line in lines_of(done, ("not reproduced", "within doubt")):
        console.print(line, highlight=False, markup=False)
    for failure in done.failures:
        console.print(f"The gate fails: {failure}", highlight=False, markup=False, style="bold red")
    console.print(f"The page is {out}/index.html.", highlight=False, markup=False)
