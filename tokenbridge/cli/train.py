"""`tokenbridge train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tokenbridge.cli.options import MAX_JOBS, Data, Json, ScaleName, app
from tokenbridge.utils.console import print_line


@app.command()
def train(
    scale: ScaleName = "tiny",
    names: Annotated[
        list[str] | None, typer.Argument(help="The recipes to train; all of the scale by default.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder for weights and logs; runs/SCALE-training by default.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_JOBS, help="The number of models at a time; one for each core by default, and one on a GPU."
        ),
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Train the models of a scale from nothing; a run that was killed goes on where it was."""
    from tokenbridge.configs.scales import find_scale
    from tokenbridge.training.scale import train_scale

    chosen = find_scale(scale, data)
    out = out or Path("runs") / f"{scale}-training"
    options = [*(["--data", data] if data else []), *(["--json"] if as_json else [])]
    log = train_scale(chosen, names or [], out=out, jobs=jobs, options=options)
    if log is None:
        return
    if as_json:
        print(json.dumps(log))
    else:
        print_line(f"{log['name']}: loss {log['loss'][-1][1]:.4f} after {log['seconds']:.0f} s, in {out / 'weights'}/")
