"""All models of a scale, each in a process of its own: what `tokenbridge train` does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tokenbridge.configs.schema import Scale
from tokenbridge.models.registry import SYSTEMS
from tokenbridge.training.train import latents_of, train_recipe
from tokenbridge.utils.errors import UserError


def train_scale(
    scale: Scale, names: Sequence[str] = (), *, out: Path | str, jobs: int | None = None, options: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Train models of a scale from nothing into `out/weights`; a run that was killed goes on where it was.

    Args:
        scale: whose recipes are trained.
        names: of the recipes; all but the optional ones if there are none.
        out: folder of the weights and logs.
        jobs: models at a time; None is one for each core on a CPU, and one on a GPU.
        options: of the command `tokenbridge train` that each of several models is trained by.

    Returns:
        The log of the only model, which is trained in this process; None for several.

    Raises:
        UserError: an unknown recipe, or a training that failed, whose message is on stderr.
    """
    out = Path(out)
    recipes = [scale.recipe(name) for name in names] if names else [r for r in scale.recipes if not r.optional]
    if not torch.cuda.is_available():
        # One thread a model: sums are then added in one order whatever the number of cores, so that a seed gives
        # the same weights, and two models side by side use two cores better than one model does.
        torch.set_num_threads(1)
        jobs = jobs or os.cpu_count() or 1
    if len(recipes) == 1:
        return train_recipe(scale, recipes[0].name, weights=out / "weights", runs=out)
    # Generators need a tokenizer, so they come second.
    for stage in ([r for r in recipes if not r.is_generator], [r for r in recipes if r.is_generator]):
        if any(recipe.is_generator and not SYSTEMS[recipe.kind].codes for recipe in stage):
            latents_of(scale, out / "weights", out / "latents")  # once, before several processes want them
        with ThreadPoolExecutor(max_workers=jobs or 1) as pool:
            commands = [["train", scale.name, recipe.name, "--out", str(out), *options] for recipe in stage]
            if failed := [code for code in pool.map(run_command, commands) if code]:
                raise UserError(f"{len(failed)} of {len(stage)} trainings failed; their messages are above.")
    return None


def run_command(arguments: Sequence[str]) -> int:
    """Run `tokenbridge` in a process of its own and return its exit code; what it says is passed on line by line."""
    command = [sys.executable, "-m", "tokenbridge", *arguments]
    with subprocess.Popen(command, stdout=sys.stdout, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
    return process.returncode
