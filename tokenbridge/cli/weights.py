"""`tokenbridge convert`, `artifacts` and `conformance`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenbridge.cli.options import Json, app
from tokenbridge.utils.console import colored, print_line, print_table
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import make_folder

if TYPE_CHECKING:
    from collections.abc import Sequence


@app.command()
def conformance(
    paths: Annotated[
        list[Path], typer.Argument(help="Golden files (.npz), or folders that hold them.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Run golden files: numbers of the official code against ours; exit code 1 if any output fails."""
    from tokenbridge.conformance.judge import conformance as run

    if not run(paths, as_json=as_json):
        sys.exit(1)


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="The published file of a model or a tokenizer, or the folder that holds it.")
    ],
    name: Annotated[
        str, typer.Argument(help="What it is: a preset (`tokenbridge models`), kl16, llamagen-vq16 or givt-vae.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write, with config.json and safetensors.")],
    vae: Annotated[
        Path | None, typer.Option(help="kl16.ckpt, if a whole pipeline of TokenBridge is to be written, with this VAE.")
    ] = None,
    ema: Annotated[
        bool, typer.Option(help="Take the moving average of the weights, as published, or the last weights.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what was converted to the folder before.")
    ] = False,
) -> None:
    """Turn a published checkpoint into a diffusers folder, strictly; pickled code in it is never run."""
    if vae is None:
        from tokenbridge.sampling.convert import convert as run

        run(checkpoint, out, name, ema=ema, overwrite=overwrite)
    else:
        from tokenbridge.sampling.pipeline import convert_pipeline

        convert_pipeline(checkpoint, vae, out, name, ema=ema, overwrite=overwrite)
    print_line(f"{name} is in {out}/")


@app.command()
def artifacts(
    keys: Annotated[
        list[str] | None, typer.Argument(help="The files by their keys; all by default.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="The folder of the files; $TOKENBRIDGE_ARTIFACTS by default.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash the files that are here, and check them.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Download those of KEYS that are missing.")] = False,
    accept: Annotated[str | None, typer.Option(help="Record this file's hash anew.", metavar="KEY")] = None,
    as_json: Json = False,
) -> None:
    """Show which published files are here, and of what hashes; exit code 1 if one of KEYS is missing or changed."""
    from tokenbridge.weights import artifacts as files

    if accept is not None:
        files.accept(accept, folder=folder)
    if download:
        if not keys:
            raise UserError("Name the files to download, for example `tokenbridge artifacts inception --download`.")
        if folder is not None:
            make_folder(folder)
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
    body = []
    for status in listed:
        size = f"{status.size / 1e6:,.1f} MB" if status.size is not None else "–"
        sha256 = f"{status.sha256[:12]}…" if status.sha256 else "–"
        where = str(status.path or status.artifact.origin)
        body.append([status.artifact.key, colored(status.state), size, sha256, status.artifact.licence, where])
    print_table("Published files", ["", "", "size", "SHA-256", "licence", "path, or origin"], body)
