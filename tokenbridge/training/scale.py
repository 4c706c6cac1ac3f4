"""Training all models of a scale, each in a process of its own; `tokenbridge train` calls this module."""

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
from tokenbridge.utils.files import check_replaceable
from tokenbridge.utils.parent import environment_of_child
from tokenbridge.weights.diffusers import MODEL_FILES


def train_scale(
    scale: Scale, names: Sequence[str] = (), *, out: Path | str, jobs: int | None = None, options: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Train models of a scale from scratch and save them to `out/weights`; a run that was killed is resumed.

    A single model is trained in this process. Each of several models is trained in a process of its own.

    Args:
        names: the recipes to train; if empty, all recipes that are not optional.
        out: folder of weights, logs, checkpoints and encoded images.
        jobs: number of models that are trained at a time; None means one for each core, or one if there is a GPU.
        options: further options for the command `tokenbridge train`, which trains each of several models.

    Returns:
        The training log of a single model; None for several models.

    Raises:
        UserError: a recipe is unknown, or a training failed, in which case its message is on stderr.
    """
    out = Path(out)
    recipes = [scale.recipe(name) for name in names] if names else [r for r in scale.recipes if not r.optional]
    for recipe in recipes:  # before hours of work, at whose end the last folder would be refused
        check_replaceable(out / "weights" / recipe.name, MODEL_FILES)
    if not torch.cuda.is_available():
        # With one thread for each model, the order of additions does not depend on the number of cores, so a seed
        # always gives the same weights. Two models side by side also use two cores better than one model does.
        torch.set_num_threads(1)
        jobs = jobs or os.cpu_count() or 1
    if len(recipes) == 1:
        return train_recipe(scale, recipes[0].name, weights=out / "weights", runs=out)
    # Generators need a tokenizer, so they come second.
    for stage in ([r for r in recipes if not r.is_generator], [r for r in recipes if r.is_generator]):
        if any(recipe.is_generator and not SYSTEMS[recipe.kind].codes for recipe in stage):
            latents_of(scale, out / "weights", out / "latents")  # encode images once, before several processes start
        with ThreadPoolExecutor(max_workers=jobs or 1) as pool:
            commands = [["train", scale.name, recipe.name, "--out", str(out), *options] for recipe in stage]
            if failed := [code for code in pool.map(run_command, commands) if code]:
                raise UserError(f"{len(failed)} of {len(stage)} trainings failed; their messages are above.")
    return None


def run_command(arguments: Sequence[str]) -> int:
    """Run `tokenbridge` in a process of its own, pass its stderr on line by line, and return its exit code."""
    command = [sys.executable, "-m", "tokenbridge", *arguments]
    environment = environment_of_child()
    with subprocess.Popen(  # noqa: S603
        command, stdout=sys.stdout, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line != "Interrupted.\n":  # which this process says itself
                sys.stderr.write(line)
                sys.stderr.flush()
    return process.returncode
