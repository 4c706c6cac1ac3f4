"""`tokenbridge train`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenbridge.cli.options import Data, Json, ScaleName, app, find_scale
from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence


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

    from tokenbridge.training.train import latents_of, train_recipe

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
                raise UserError(f"{len(failed)} of {len(stage)} trainings failed; their messages are above.")


def _run_self(arguments: Sequence[str]) -> int:
    """Run this command in a process of its own, passing on what it says line by line."""
    command = [sys.executable, "-m", "tokenbridge", *arguments]
    with subprocess.Popen(command, stdout=sys.stdout, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
    return process.returncode
