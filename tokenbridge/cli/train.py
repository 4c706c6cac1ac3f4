"""`tokenbridge train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tokenbridge.cli.options import Data, Json, ScaleName, app
from tokenbridge.utils.console import print_line


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
