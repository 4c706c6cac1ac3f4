"""Time the sampling of a whole preset and the reference path in turns: `python -m benchmarks.speed_l --device cpu`.

The weights are drawn by the goldens' rule, since the time of a product does not depend on the values multiplied. The
settings are the preset's own (guidance 3.1, temperature 0.96 for L). Times are host seconds of one batch, measured
after waiting for the device.

On the CPU, in float32, three things are timed: 4 iterations, 64 iterations (extrapolated), and the head alone. On
CUDA, 64 and 256 iterations are timed at batch 1 and at the best batch. There the package runs in bfloat16, eager and
compiled, and the reference has float32 weights under bfloat16 autocast (the official evaluation uses float16).

Extrapolation: a few iterations of the schedule are timed. The seconds per counted FLOP are interpolated between them,
and multiplied by the FLOP of each iteration.

Shape letters: B batch, L positions, C channels.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.reference import Reference, draw, greedy, reference_of
from benchmarks.steps import Step, official_arguments, to_device
from tokenbridge.models.cost import count_pass
from tokenbridge.models.masked_sampling import masked_counts
from tokenbridge.models.noise import ImageNoise, image_noise
from tokenbridge.models.tokenbridge.checkpoint import tokenbridge_layout
from tokenbridge.models.tokenbridge.cost import count_head
from tokenbridge.models.tokenbridge.heads import ARHead
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.models.tokenbridge.presets import PRESETS, create_model
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling, generate_tokens
from tokenbridge.utils import provenance
from tokenbridge.utils.files import reference_folder, write_json, write_text
from tokenbridge.utils.flop import count, placeholder, quadratic
from tokenbridge.weights.official import load_official
from tokenbridge.weights.published import find_preset
from tokenbridge.weights.rule import RULE, rule_state

WEIGHTS = {"rule": RULE, "salt": "speed"}
TARGETS = {("image", 4): 2.5, ("image", 64): 1.2, ("head", None): 4.0}  # speed-ups to reach, for L on two cores
AGREEMENT = 0.99  # share of equal tokens in float32, as for the goldens; a draw may flip when sums are reordered
BUSY = 0.1  # the table warns if other processes took a larger share of the machine during the run
MAX_BATCH = 512
BATCH_GAIN = 1.03  # the search ends when doubling the batch speeds up an image by less than this factor

Function = Callable[[], object]


@dataclass(frozen=True)
class Plan:
    """What is timed, and how thoroughly."""

    whole: tuple[int, ...]  # numbers of iterations of runs that are timed whole
    extrapolated: tuple[int, ...]  # numbers of iterations of runs that are extrapolated
    num_points: int = 4  # timed iterations of an extrapolated run
    head_positions: int | None = None  # the head alone is timed on this many
    rounds: int = 3
    bfloat16: bool = False  # the package in bfloat16 and the reference under autocast, instead of float32
    compile_backend: str | None = None  # of torch.compile; None times the eager variant only
    best_batch: bool = False  # also extrapolate at the batch size with the least time per image


PLANS = {
    "cpu": Plan(whole=(4,), extrapolated=(64,), head_positions=256),
    "cuda": Plan(whole=(64, 256), extrapolated=(), bfloat16=True, compile_backend="inductor", best_batch=True),
}


@dataclass(frozen=True)
class Cost:
    """Operations of both paths for one image, without decoding its latents, which is not timed either."""

    num_positions: int
    fast: Callable[[int, int], dict[str, float]]  # of a pass of the backbone, see `count_pass`
    reference: Callable[[int], dict[str, float]]  # likewise, see `count_reference_pass`
    head: Mapping[str, int]  # of one position: "fast" and "reference"

    def iterations(self, num_iterations: int, *, guided: bool) -> dict[str, list[float]]:
        """Return the operations of every iteration, "fast" and "reference"; guidance runs the backbone twice."""
        flop: dict[str, list[float]] = {"fast": [], "reference": []}
        length = self.num_positions
        for before, after in itertools.pairwise([length, *masked_counts(length, num_iterations)]):
            fast, reference = self.fast(length - before, before - after), self.reference(length - before)
            for name, one_pass in (("fast", fast), ("reference", reference)):
                flop[name].append((1 + guided) * sum(one_pass.values()) + (before - after) * self.head[name])
        return flop


def count_reference_pass(reference: Reference, length: int) -> Callable[[int], dict[str, float]]:
    """Return a function from num_visible to the operations of one pass of the reference's backbone, by part.

    As `count_pass` does for the package: the official code embeds masked positions too, and runs the last block of
    the decoder for all positions.

    Args:
        reference: on the meta device.
        length: L.
    """
    width, num_channels = reference.weights["z_proj.weight"].shape
    num_buffer = reference.config["buffer_size"]
    latents, embedding = placeholder(1, length, num_channels), placeholder(1, width)

    def mask(num_visible: int) -> Tensor:
        return (torch.arange(length) >= num_visible).float()[None]  # on the CPU, since its values decide shapes

    encoder = quadratic(lambda n: count(lambda: reference.encoder(latents, mask(n), embedding)))
    decoder = quadratic(lambda n: count(lambda: reference.decoder(placeholder(1, num_buffer + n, width), mask(n))))
    return lambda num_visible: {"encoder": encoder(num_visible), "decoder": decoder(num_visible)}


def count_cost(sizes: Mapping[str, Any]) -> Cost:
    """Count both paths for one image; `sizes` are keyword arguments of `TokenBridge`."""
    model = meta_model(sizes)
    reference, context = reference_of(model), placeholder(1, model.head.condition_proj.in_features)
    return Cost(
        model.num_positions,
        count_pass(model.backbone),
        count_reference_pass(reference, model.num_positions),
        {
            "fast": count_head(model.head),
            "reference": count(lambda: reference.sample_channels(context, greedy)),
        },
    )


def meta_model(sizes: Mapping[str, Any]) -> TokenBridge:
    """Build TokenBridge of these keyword arguments on the meta device."""
    with torch.device("meta"):
        return TokenBridge.from_config(dict(sizes)).eval()


@dataclass(frozen=True)
class Setting:
    """The two paths, with what they sample."""

    fast: TokenBridge
    plain: Reference
    config: TokenBridgeSampling
    labels: Tensor  # [B]
    noise: ImageNoise
    cost: Cost
    autocast: torch.dtype | None = None  # of the reference
    compiled: dict[tuple[str, str], Callable[..., Any]] | None = None  # compiled methods by (part, name)

    @property
    def device(self) -> torch.device:
        """The device of both paths."""
        return self.fast.device

    def variants(self, fast: Function, plain: Function) -> dict[str, Function]:
        """Return the functions that are timed in turns, by name."""

        def compiled() -> object:
            assert self.compiled is not None
            with methods(self.fast, self.compiled):
                return fast()

        def reference() -> object:
            kind = self.device.type
            with torch.no_grad(), torch.autocast(kind, self.autocast, enabled=self.autocast is not None):
                return plain()

        return {"eager": fast, **({"compiled": compiled} if self.compiled else {}), "reference": reference}

    def flop(self, num_iterations: int) -> dict[str, list[float]]:
        """Return the operations of every iteration for one image, "fast" and "reference"."""
        return self.cost.iterations(num_iterations, guided=self.config.guidance_scale != 1)

    def tflop(self, num_iterations: int) -> dict[str, float]:
        """Return the operations of a batch, in TFLOP."""
        return {name: sum(flop) * len(self.labels) / 1e12 for name, flop in self.flop(num_iterations).items()}

    def step(self, num_iterations: int, number: int) -> Step:
        """Return iteration `number` of a run, with visible tokens drawn at random."""
        shape = *self.noise.orders.shape, self.fast.num_channels
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(self.fast.quantizer.num_levels, shape, generator=generator).to(self.device)
        config = replace(self.config, num_iterations=num_iterations)
        return Step(self.fast, self.plain, config, number, self.labels, self.noise, tokens)


@contextmanager
def methods(model: TokenBridge, replacements: dict[tuple[str, str], Callable[..., Any]]) -> Iterator[None]:
    """Replace methods of the model's parts, by (part, name), within a `with` block."""
    for (part, name), function in replacements.items():
        setattr(model.get_submodule(part), name, function)
    try:
        yield
    finally:
        for part, name in replacements:
            delattr(model.get_submodule(part), name)


def compiled_methods(model: TokenBridge, backend: str) -> dict[tuple[str, str], Callable[..., Any]]:
    """Compile the methods of an iteration, with dynamic shapes where the number of positions changes."""
    return {
        ("backbone", "encode"): torch.compile(model.backbone.encode, backend=backend, dynamic=True),
        ("backbone", "decode"): torch.compile(model.backbone.decode, backend=backend, dynamic=True),
        ("head", "sample"): torch.compile(model.head.sample, backend=backend),
    }


def make_setting(preset: str, device: str, plan: Plan) -> Setting:
    """Build both paths on `device`, for one image."""
    model = create_model(preset)
    layout = tokenbridge_layout(model)
    load_official(model, rule_state(layout, WEIGHTS), layout)
    model.to(device)
    fast, autocast = model, None
    if plan.bfloat16:
        fast, autocast = copy.deepcopy(model).to(torch.bfloat16), torch.bfloat16
    compiled = None if plan.compile_backend is None else compiled_methods(fast, plan.compile_backend)
    plain = reference_of(model)
    labels = torch.zeros(0, dtype=torch.int64)
    noise = ImageNoise(labels, labels)
    # The tiny preset's settings have the other first element.
    config = replace(find_preset(preset, PRESETS).sampling_config(), first_element="official")
    setting = Setting(fast, plain, config, labels, noise, count_cost(model.config), autocast, compiled)
    return with_batch(setting, 1)


def with_batch(setting: Setting, batch_size: int) -> Setting:
    """Return the setting with another number of images."""
    model = setting.fast
    labels = (torch.arange(batch_size) % model.num_classes).to(setting.device)
    noise = image_noise(0, list(range(batch_size)), model.num_positions, model.num_channels)
    return replace(setting, labels=labels, noise=to_device(noise, setting.device))


# ------------------------------------------------------------------------------------------------ timing


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Function, device: torch.device) -> float:
    """Time one call."""
    synchronize(device)
    start = time.perf_counter()
    with torch.inference_mode():
        function()
    synchronize(device)
    return time.perf_counter() - start


def in_turns(variants: dict[str, Function], device: torch.device) -> dict[str, float]:
    """Time one call of each function, one after another."""
    return {name: seconds_of(function, device) for name, function in variants.items()}


def extrapolate(numbers: list[int], seconds: list[float], flop: list[float]) -> float:
    """Extrapolate from the seconds of some iterations to those of the whole run.

    Args:
        numbers: the timed iterations, rising.
        seconds: the time of each of them.
        flop: the operations of every iteration of the run.
    """
    per_flop = [s / flop[n] for n, s in zip(numbers, seconds, strict=True)]
    between = np.interp(np.arange(len(flop)), numbers, per_flop)
    return float(between @ np.asarray(flop))


# -------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One benchmark, timed in all variants."""

    what: Literal["image", "head"]
    num_iterations: int | None
    batch_size: int  # images, or positions of the head alone
    rounds: list[dict[str, float]]  # for each round, seconds of a batch by variant
    tflop: dict[str, float]  # of a batch: "fast" and "reference"
    timed_iterations: list[dict[str, Any]] | None = None  # of an extrapolated row: number and seconds by variant

    @property
    def name(self) -> str:
        """The name in the table."""
        what = "head alone, positions" if self.what == "head" else f"{self.num_iterations} iterations, images"
        return f"{what}, extrapolated" if self.timed_iterations is not None else what

    def median(self, variant: str) -> float:
        """Return the median seconds of a batch."""
        return statistics.median(r[variant] for r in self.rounds)

    def to_json(self, peak: float) -> dict[str, Any]:
        """Return the row with the numbers derived from it; `peak` is in TFLOP/s."""
        target = TARGETS.get((self.what, self.num_iterations))
        variants = {}
        for name in self.rounds[0]:
            seconds = [r[name] for r in self.rounds]
            ratios = [r["reference"] / r[name] for r in self.rounds]
            tflop = self.tflop["reference" if name == "reference" else "fast"]
            ratio = self.median("reference") / self.median(name)
            variants[name] = {
                "median_seconds": self.median(name),
                "seconds": seconds,
                "per_second": self.batch_size / self.median(name),
                "share_of_matmul_peak": tflop / self.median(name) / peak,
                "ratio": ratio,
                "ratio_of_rounds": [min(ratios), max(ratios)],
            }
            if target is not None and name != "reference":
                variants[name] |= {"target_ratio": target, "target_met": ratio >= target}
        return {
            "name": self.name,
            "what": self.what,
            "num_iterations": self.num_iterations,
            "batch_size": self.batch_size,
            "extrapolated": self.timed_iterations is not None,
            "tflop": self.tflop,
            "ceiling_ratio": self.tflop["reference"] / self.tflop["fast"],
            "variants": variants,
            **({} if self.timed_iterations is None else {"timed_iterations": self.timed_iterations}),
        }


def time_whole(setting: Setting, num_iterations: int, rounds: int, *, warm_up: bool) -> Row:
    """Time whole runs; no warm-up is needed if `time_extrapolated` has run the same shapes before."""
    config = replace(setting.config, num_iterations=num_iterations)
    arguments = official_arguments(config)
    noise, labels = setting.noise, setting.labels
    variants = setting.variants(
        lambda: generate_tokens(setting.fast, labels, config, noise),
        lambda: setting.plain.sample_tokens(labels, noise.orders, arguments, noise.uniforms),
    )
    if warm_up:
        in_turns(variants, setting.device)
    seconds = [in_turns(variants, setting.device) for _ in range(rounds)]
    return Row("image", num_iterations, len(labels), seconds, setting.tflop(num_iterations))


def time_extrapolated(setting: Setting, num_iterations: int, num_points: int, rounds: int) -> Row:
    """Time some iterations of a run and extrapolate to all of them; a first pass over them is the warm-up."""
    flop = setting.flop(num_iterations)
    numbers = sorted({round(x) for x in np.linspace(0, num_iterations - 1, num_points)})
    steps = [setting.step(num_iterations, number) for number in numbers]
    variants = [setting.variants(step.fast, step.plain) for step in steps]
    timed = [[in_turns(v, setting.device) for v in variants] for _ in range(1 + rounds)][1:]
    seconds = [
        {
            name: extrapolate(numbers, [s[name] for s in one], flop["reference" if name == "reference" else "fast"])
            for name in one[0]
        }
        for one in timed
    ]
    points = [
        {
            "number": number,
            "num_visible": setting.fast.num_positions - step.num_masked,
            "num_predicted": step.num_masked - step.num_masked_after,
            "seconds": {name: [one[i][name] for one in timed] for name in timed[0][0]},
        }
        for i, (number, step) in enumerate(zip(numbers, steps, strict=True))
    ]
    return Row("image", num_iterations, len(setting.labels), seconds, setting.tflop(num_iterations), points)


def time_head(setting: Setting, num_positions: int, rounds: int) -> Row:
    """Time the head alone; the warm-up runs on a sixteenth of the positions."""
    head, reference = setting.fast.head, setting.plain
    assert isinstance(head, ARHead)
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(num_positions, head.num_channels, generator=generator).to(setting.device)
    context = torch.randn(num_positions, head.condition_proj.in_features, generator=generator)
    context = context.to(setting.device, head.condition_proj.weight.dtype)

    def variants(count: int) -> dict[str, Function]:
        pick = draw(uniforms[:count], setting.config.temperature)
        return setting.variants(
            lambda: head.sample(context[:count], pick), lambda: reference.sample_channels(context[:count], pick)
        )

    in_turns(variants(max(1, num_positions // 16)), setting.device)
    seconds = [in_turns(variants(num_positions), setting.device) for _ in range(rounds)]
    tflop = {name: num_positions * flop / 1e12 for name, flop in setting.cost.head.items()}
    return Row("head", None, num_positions, seconds, tflop)


def agreement(setting: Setting, num_iterations: int) -> float:
    """Return the share of equal tokens of both paths, in the middle iteration."""
    step = setting.step(num_iterations, num_iterations // 2)
    results = setting.variants(step.fast, step.plain)
    with torch.inference_mode():
        ours, theirs = results["eager"](), results["reference"]()
    assert isinstance(ours, Tensor)
    assert isinstance(theirs, Tensor)
    predicted = setting.noise.orders[:, step.num_masked_after : step.num_masked]
    same = (ours == theirs).gather(1, predicted[..., None].expand(-1, -1, ours.shape[-1]))
    return same.double().mean().item()


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best TFLOP/s of a product of square matrices, of size 8192 on a GPU and 2048 on the CPU."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [seconds_of(lambda: a @ b, device) for _ in range(6)]
    return 2 * size**3 / min(seconds) / 1e12


def best_batch(setting: Setting, num_iterations: int) -> int:
    """Double the batch while that speeds up an image, measured on the middle iteration of the eager package."""
    best, best_rate, batch_size = 1, 0.0, 1
    while batch_size <= MAX_BATCH:
        try:
            step = with_batch(setting, batch_size).step(num_iterations, num_iterations // 2)
            seconds_of(step.fast, setting.device)
            rate = batch_size / min(seconds_of(step.fast, setting.device) for _ in range(2))
        except torch.OutOfMemoryError:
            break
        if rate < best_rate * BATCH_GAIN:
            break
        best, best_rate, batch_size = batch_size, rate, 2 * batch_size
    return best


# ----------------------------------------------------------------------------------------------- command


def measure(setting: Setting, plan: Plan, preset: str) -> dict[str, Any]:
    """Time everything in the plan and return the report.

    Raises:
        RuntimeError: the two paths do not agree, so comparing their times would mean nothing.
    """
    stopwatch = provenance.Stopwatch()
    first_run = (plan.extrapolated or plan.whole)[0]
    agree = agreement(setting, first_run)
    if setting.autocast is None and agree < AGREEMENT:
        raise RuntimeError(f"Only {agree:.1%} of the tokens agree with the reference path; nothing was timed.")
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(f"{row.name}, batch {row.batch_size}: {row.rounds}", file=sys.stderr, flush=True)

    for n in plan.extrapolated:
        add(time_extrapolated(setting, n, plan.num_points, plan.rounds))
    if plan.head_positions is not None:
        add(time_head(setting, plan.head_positions, plan.rounds))
    for n in plan.whole:
        add(time_whole(setting, n, plan.rounds, warm_up=not plan.extrapolated))
    if plan.best_batch and (batch_size := best_batch(setting, first_run)) > 1:
        larger = with_batch(setting, batch_size)
        for n in plan.whole:
            add(time_extrapolated(larger, n, plan.num_points, plan.rounds))
    dtype = next(setting.fast.parameters()).dtype
    peak = matmul_peak(setting.device, dtype)
    record = stopwatch.record()
    return {
        "preset": preset,
        "num_parameters": sum(p.numel() for p in setting.fast.parameters()),
        "weights": WEIGHTS,
        "device": setting.device.type,
        "num_threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "reference_autocast": None if setting.autocast is None else str(setting.autocast).removeprefix("torch."),
        "guidance_scale": setting.config.guidance_scale,
        "temperature": setting.config.temperature,
        "tokens_equal_to_reference": agree,
        "matmul_peak_tflops": peak,
        "rows": [row.to_json(peak) for row in rows],
        "provenance": {
            "command": f"python -m benchmarks.{provenance.command().replace('.py', '')}",
            "started": record["started"],
            "seconds": record["wall_seconds"],
            "share_of_other_processes": stopwatch.share_of_other_processes(),
            **provenance.origin(),
        },
    }


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a Markdown table, with the conditions of the measurement."""
    origin = report["provenance"]
    others = origin["share_of_other_processes"]
    where = ", ".join(origin["hardware"]["accelerators"]) or origin["hardware"]["processor"]
    lines = [
        f"# Sampling speed of {report['preset']} on {report['device']}",
        "",
        f"{where}; {report['num_threads']} threads; {report['dtype']}; torch {origin['versions']['torch']}; "
        f"{origin['started']}; other processes took {others:.0%} of the machine; "
        f"measured matmul peak {report['matmul_peak_tflops']:.3g} TFLOP/s.",
        "",
    ]
    if others > BUSY:
        lines += ["**The machine was busy: these numbers are no result.**", ""]
    lines += [
        "| what | batch | path | seconds (median) | per second | share of peak | ratio (rounds) | ceiling | target |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in report["rows"]:
        for name, v in row["variants"].items():
            cells = [f"{v['median_seconds']:.4g}", f"{v['per_second']:.4g}", f"{v['share_of_matmul_peak']:.0%}"]
            if name == "reference":
                cells += ["1", "", ""]
            else:
                low, high = v["ratio_of_rounds"]
                cells += [f"{v['ratio']:.2f} ({low:.2f} to {high:.2f})", f"{row['ceiling_ratio']:.2f}"]
                met = "met" if v.get("target_met") else "MISSED"
                cells += [f">= {v['target_ratio']:g}, {met}" if "target_ratio" in v else ""]
            lines.append(f"| {row['name']} | {row['batch_size']} | {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Ratio: seconds of the reference path over those of the row, medians of rounds measured in turns. Ceiling: the "
        "same in counted FLOP. Extrapolated: from some iterations of the schedule, by interpolated seconds per counted "
        "FLOP (`timed_iterations` in the JSON). Reference: benchmarks/reference.py, which does what the official "
        "sampler does. Weights are drawn by the goldens' rule.",
    ]
    return "\n".join(lines)


def run(preset: str, device: str, plan: Plan, folder: Path) -> dict[str, Any]:
    """Measure, write `PRESET-DEVICE.json` and `.md` to `folder`, and return the report."""
    report = measure(make_setting(preset, device, plan), plan, preset)
    name = f"{preset}-{device}"
    write_json(folder / f"{name}.json", report)
    write_text(folder / f"{name}.md", to_markdown(report))
    return report


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    preset: Annotated[str, typer.Option(help="Name of the preset.")] = "tokenbridge-l",
    num_threads: Annotated[int, typer.Option(help="Threads on the CPU.")] = 2,
    rounds: Annotated[int, typer.Option(help="How often each path is timed.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder; reference_results/benchmarks by default.")] = None,
) -> None:
    """Time the sampler and the reference path in turns. For L this takes minutes on two cores."""
    if device not in PLANS:
        raise typer.BadParameter(f"There are {' and '.join(PLANS)}, not {device!r}.", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "No CUDA GPU was found. Run it on a machine that has one, or with --device cpu.", param_hint="--device"
        )
    torch.set_num_threads(num_threads)
    folder = output or reference_folder() / "benchmarks"
    report = run(preset, device, replace(PLANS[device], rounds=rounds), folder)
    print(to_markdown(report))


if __name__ == "__main__":
    typer.run(main)
