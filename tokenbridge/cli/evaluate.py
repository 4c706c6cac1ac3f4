"""`tokenbridge evaluate`, `reference` and `reconstruct`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenbridge.cli.options import (
    MAX_BATCH,
    MAX_IMAGES,
    MAX_RESAMPLES,
    MAX_SEED,
    Json,
    Offline,
    Quantizer,
    app,
    not_one,
)
from tokenbridge.utils import files
from tokenbridge.utils.console import print_line, print_table
from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from tokenbridge.evaluation.inception import Inception
    from tokenbridge.results.schema import Results


@app.command()
def reconstruct(
    source: Annotated[
        str,
        typer.Argument(help="The images: a folder, Parquet files, digits, cifar10, imagenet, or a name on the hub."),
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="A diffusers autoencoder: folder or hub name; the tiny VAE for digits.")
    ] = None,
    levels: Annotated[str, typer.Option(help="Numbers of quantisation levels, separated by commas.")] = "8,16,32,64",
    quantizer: Annotated[Quantizer, typer.Option(help="How the levels are chosen.")] = "gaussian",
    value_range: Annotated[float, typer.Option(help="Latents beyond this size are clamped.")] = 5.0,
    scale: Annotated[
        str, typer.Option(help="The factor of the latents: config (the model's own), measure, or a number.")
    ] = "config",
    split: Annotated[str, typer.Option(help="The split of the source.")] = "test",
    image_size: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Crop images to this size around their centre.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, max=MAX_IMAGES, help="Use at most this many images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="The number of images at a time.")] = 32,
    inception_weights: Annotated[
        Path | None, typer.Option(help="torch-fidelity's Inception weights, which rFID needs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the table and the picture.")] = Path("runs/reconstruction"),
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="The seed that draws the images under --limit.")] = 0,
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
        list[Path],
        typer.Argument(help="Folders of images, or .npz files with arr_0; one for each seed.", show_default=False),
    ],
    reference: Annotated[Path, typer.Option(help="Statistics (.npz with mu, sigma, arr_0), or a folder of images.")],
    inception: Annotated[
        Path | None,
        typer.Option(
            "--inception",
            "--inception-weights",
            help="torch-fidelity's Inception weights; they are looked for in the usual places by default.",
        ),
    ] = None,
    cleanfid_inception: Annotated[
        Path | None, typer.Option(help="clean-fid's inception-2015-12-05.pt, for FID by its own features.")
    ] = None,
    allow_other_inception: Annotated[
        bool, typer.Option("--allow-other-inception", help="Take other weights of --inception; scores are labelled.")
    ] = False,
    allow_few: Annotated[
        bool, typer.Option("--allow-few", help="Score fewer than 2,048 images too; the scores are labelled.")
    ] = False,
    num_bootstrap: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_RESAMPLES,
            callback=not_one,
            help="The number of resamples behind FID's interval; 0 leaves it out.",
        ),
    ] = 100,
    seed: Annotated[
        int,
        typer.Option(min=0, max=MAX_SEED, help="The seed of IS, KID and the bootstrap; torch-fidelity's by default."),
    ] = 2020,
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="The number of images at a time.")] = 64,
    cache: Annotated[Path, typer.Option(help="The folder that keeps features.")] = Path("runs/features"),
    out: Annotated[Path | None, typer.Option(help="The result file to write (JSON).")] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Score generated images: FID, Inception Score, precision, recall and KID by Inception."""
    from tokenbridge.evaluation.inception import find_inception, load_cleanfid_inception, load_inception
    from tokenbridge.reproduction.evaluation import measure_evaluation
    from tokenbridge.results.schema import read, write

    def load() -> Inception:
        """Look at what was not named on the command line only once the samples and the reference are good."""
        if out is not None:
            files.check_writable(out, lambda: read(out))
        return load_inception(inception or find_inception(), allow_other=allow_other_inception)

    measured = measure_evaluation(
        samples,
        reference,
        inception=load,
        cleanfid_inception=None if cleanfid_inception is None else load_cleanfid_inception(cleanfid_inception),
        allow_few=allow_few,
        num_bootstrap=num_bootstrap,
        seed=seed,
        batch_size=batch_size,
        cache=cache,
    )
    # The scores are printed before they are written: a disk that is full by now does not cost them.
    if as_json:
        print(json.dumps(measured.model_dump(), indent=2))
    else:
        _print_evaluation(measured, reference)
    if out is not None:
        write(out, measured)


def _print_evaluation(measured: Results, reference: Path) -> None:
    from tokenbridge.results.markdown import cell, columns_of

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
    source: Annotated[
        str,
        typer.Argument(help="The images: a folder, Parquet files, digits, cifar10, imagenet, or a name on the hub."),
    ],
    out: Annotated[Path, typer.Option(help="The .npz file to write.")],
    split: Annotated[str, typer.Option(help="The split of the source.")] = "train",
    image_size: Annotated[
        int, typer.Option(min=1, max=4096, help="Crop images to this size around their centre, as ADM does.")
    ] = 256,
    keep_images: Annotated[
        int,
        typer.Option(min=0, max=MAX_IMAGES, help="The number of images to store too, for precision, recall and KID."),
    ] = 0,
    inception: Annotated[
        Path | None,
        typer.Option(
            "--inception",
            "--inception-weights",
            help="torch-fidelity's Inception weights; they are looked for in the usual places by default.",
        ),
    ] = None,
    allow_other_inception: Annotated[
        bool, typer.Option("--allow-other-inception", help="Take unpublished weights.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="The seed that draws the images to keep.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="The number of images at a time.")] = 64,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Make the reference statistics of a data set: mean and covariance of Inception's features."""
    from tokenbridge.evaluation.inception import find_inception, load_inception
    from tokenbridge.evaluation.reference import make_reference

    meta = make_reference(
        source,
        out,
        inception=lambda: load_inception(inception or find_inception(), allow_other=allow_other_inception),
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
