"""`tokenbridge evaluate`, `reference` and `reconstruct`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tokenbridge.cli.options import Json, Offline, app
from tokenbridge.utils import files
from tokenbridge.utils.console import print_line, print_table
from tokenbridge.utils.errors import UserError


@app.command()
def reconstruct(
    source: Annotated[str, typer.Argument(help="Images: a folder, Parquet, digits, cifar10, imagenet or a hub name.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="A diffusers autoencoder: folder or hub name; the tiny VAE for digits.")
    ] = None,
    levels: Annotated[str, typer.Option(help="Quantisation levels, separated by commas.")] = "8,16,32,64",
    quantizer: Annotated[str, typer.Option(help="gaussian, uniform or lloyd-max.")] = "gaussian",
    value_range: Annotated[float, typer.Option(help="Latents beyond this size are clamped.")] = 5.0,
    scale: Annotated[str, typer.Option(help="Latent scale: config, measure or a number.")] = "config",
    split: Annotated[str, typer.Option(help="Split of the source.")] = "test",
    image_size: Annotated[int | None, typer.Option(min=1, max=4096, help="Centre-crop to this size.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    inception_weights: Annotated[
        Path | None, typer.Option(help="torch-fidelity's Inception weights, for rFID.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for table and picture.")] = Path("runs/reconstruction"),
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of images under --limit.")] = 0,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Measure what a tokenizer keeps of images, continuous and quantised: PSNR, SSIM, rFID, bits per image."""
    from tokenbridge.evaluation.reconstruct import COLUMNS
    from tokenbridge.evaluation.reconstruct import reconstruct as run
    from tokenbridge.results.markdown import cell

    try:
        chosen_levels = [int(level) for level in levels.split(",")]
    except ValueError as error:
        raise UserError(f"Levels are whole numbers separated by commas, not {levels!r}.") from error
    if tokenizer is None and source != "digits":
        raise UserError(f"The tiny VAE encodes the digits alone. Name a tokenizer for {source} with --tokenizer.")
    report = run(
        source,
        tokenizer=tokenizer or str(files.reference_folder() / "tiny" / "weights" / "vae"),
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
    print_table("Reconstruction", ["", *COLUMNS], [[r.label, *[cell(r, c) for c in COLUMNS]] for r in report.rows])
    for note in report.notes:
        print_line(note)
    print_line(f"Table and picture are in {out}/.")


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
        bool, typer.Option("--allow-other-inception", help="Take other weights of --inception; scores are labelled.")
    ] = False,
    allow_few: Annotated[
        bool, typer.Option("--allow-few", help="Take fewer than 2,048 images; scores are labelled.")
    ] = False,
    num_bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for FID's interval; 0 for none.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of IS, KID and bootstrap; torch-fidelity's by default.")] = 2020,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    cache: Annotated[Path, typer.Option(help="Folder for features.")] = Path("runs/features"),
    out: Annotated[Path | None, typer.Option(help="Result file to write (JSON).")] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Score generated images: FID, Inception Score, precision, recall and KID by Inception."""
    from tokenbridge.evaluation.inception import find_inception, load_cleanfid_inception, load_inception
    from tokenbridge.reproduction.evaluation import measure_evaluation
    from tokenbridge.results.markdown import cell, columns_of

    measured = measure_evaluation(
        samples,
        reference,
        out=out,
        inception=load_inception(inception or find_inception(), allow_other=allow_other_inception),
        cleanfid_inception=None if cleanfid_inception is None else load_cleanfid_inception(cleanfid_inception),
        allow_few=allow_few,
        num_bootstrap=num_bootstrap,
        seed=seed,
        batch_size=batch_size,
        cache=cache,
    )
    if as_json:
        print(json.dumps(measured.model_dump(), indent=2))
        return
    scored = [row for row in measured.rows if row.not_run is None]
    body = [[name, *[cell(row, name) for row in scored]] for name in columns_of(scored)]
    print_table(f"Evaluation against {reference}", ["", *[row.label for row in scored]], body)
    for row in measured.rows:
        if row.not_run is not None:
            print_line(f"{row.label}: not run: {row.not_run}.")
    for note in measured.provenance.settings["notes"]:
        print_line(note)


@app.command()
def reference(
    source: Annotated[str, typer.Argument(help="Images: a folder, Parquet, digits, cifar10, imagenet or a hub name.")],
    out: Annotated[Path, typer.Option(help="File to write (.npz).")],
    split: Annotated[str, typer.Option(help="Split of the source.")] = "train",
    image_size: Annotated[int, typer.Option(min=1, max=4096, help="Centre-crop to this size, as ADM does.")] = 256,
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
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Make the reference statistics of a data set: mean and covariance of Inception's features."""
    from tokenbridge.evaluation.inception import find_inception, load_inception
    from tokenbridge.evaluation.reference import make_reference

    meta = make_reference(
        source,
        out,
        inception=load_inception(inception or find_inception(), allow_other=allow_other_inception),
        split=split,
        image_size=image_size,
        keep_images=keep_images,
        seed=seed,
        batch_size=batch_size,
    )
    if as_json:
        print(json.dumps(meta, indent=2))
    else:
        print_line(f"Statistics of {meta['num_images']:,} images are in {out}.")


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{what} is a number, not {text!r}.") from error
