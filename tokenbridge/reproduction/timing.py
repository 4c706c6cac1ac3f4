"""The time of one prediction (table 5)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenbridge.models.givt import sampling as givt_sampling
from tokenbridge.models.mar.diffusion import diffusion_process
from tokenbridge.reproduction.workbench import MAIN_SYSTEM, Workbench
from tokenbridge.results.schema import Row
from tokenbridge.utils.console import log

NUM_DIFFUSION_STEPS = 100  # table 5


def prediction_time_rows(bench: Workbench, *, runs: int = 100) -> list[Row]:
    """Measure table 5: milliseconds to predict all channels of one position with batch size 1, mean of `runs` runs.

    Only the head is timed, from its context to the drawn or chosen values. The transformer before it and guidance do
    not count.
    """
    log("Table 5: time of one prediction")
    heads: dict[str, tuple[str, str, Callable[[Any, Tensor], Callable[[], object]]]] = {
        "uncached": ("AR head, all recomputed for each channel", MAIN_SYSTEM, _predict_uncached),
        "cached": ("AR head, key/value cache", MAIN_SYSTEM, _predict_cached),
        "diffusion": (f"MAR: diffusion head, {NUM_DIFFUSION_STEPS} steps", "mar", _predict_by_diffusion),
        "mixture": ("GIVT: Gaussian mixture", "givt", _predict_by_mixture),
        "softmax": ("LlamaGen: softmax over the codes", "llamagen", _predict_code),
    }
    times: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    there = {recipe.name for recipe in bench.scale.recipes}
    for id_, (_, name, prediction) in heads.items():
        if name not in there:
            missing[id_] = f"scale {bench.scale.name} has no recipe {name}"
            continue
        try:
            model = bench.model(name)
        except FileNotFoundError:
            missing[id_] = f"there are no weights of {name}; `tokenbridge train` makes them"
            continue
        context = torch.randn(1, model.config.width, generator=torch.Generator().manual_seed(0)).to(bench.device)
        times[id_] = _milliseconds(prediction(model, context), runs)

    def row(id_: str) -> Row:
        if id_ in missing:
            return Row(id=f"table5/{id_}", label=heads[id_][0], metrics={}, not_run=missing[id_])
        metrics = {"ms per position": statistics.mean(times[id_]), "± ms": statistics.stdev(times[id_])}
        if id_ in ("mixture", "softmax"):  # a single draw: a ratio would measure the overhead of Python
            return Row(id=f"table5/{id_}", label=heads[id_][0], metrics=metrics)
        metrics |= {
            column: statistics.median(times[slow]) / statistics.median(times[id_])
            for column, slow in (("speed-up", "uncached"), ("against diffusion", "diffusion"))
            if slow in times
        }
        return Row(id=f"table5/{id_}", label=heads[id_][0], metrics=metrics)

    return [row(id_) for id_ in heads]


def _predict_cached(model: Any, context: Tensor) -> Callable[[], object]:
    return lambda: model.head.sample(context, lambda logits, place: logits.argmax(-1))


def _predict_uncached(model: Any, context: Tensor) -> Callable[[], object]:
    def predict() -> None:
        tokens = torch.zeros(1, model.num_channels, dtype=torch.int64, device=context.device)
        for place in range(model.num_channels):
            tokens[:, place] = model.head.logits(context, tokens, first="official")[:, place].argmax(-1)

    return predict


def _predict_by_diffusion(model: Any, context: Tensor) -> Callable[[], object]:
    process = diffusion_process(NUM_DIFFUSION_STEPS, context.device)
    noise = torch.randn(1 + process.num_steps, 1, model.num_channels, generator=torch.Generator().manual_seed(0))
    noise = noise.to(context.device)
    return lambda: list(model.head.sample(process, context, noise))[-1]


def _predict_by_mixture(model: Any, context: Tensor) -> Callable[[], object]:
    config, noise = givt_sampling.GivtSampling(), givt_sampling.StreamNoise(0, [0], 0, model)
    return lambda: givt_sampling.draw_token(model.mixture(model.head(context)), None, config, noise)


def _predict_code(model: Any, context: Tensor) -> Callable[[], object]:
    return lambda: model.output(context).argmax(-1)


@torch.inference_mode()
def _milliseconds(function: Callable[[], object], runs: int) -> list[float]:
    def once() -> float:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    for _ in range(10):
        once()
    return [once() for _ in range(runs)]
