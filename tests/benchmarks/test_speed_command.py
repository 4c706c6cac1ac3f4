"""The speed command, at tiny size: the FLOP it counts, the numbers it derives, both devices' plans, its errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks import speed_l as s
from tokenbridge.models.masked_sampling import masked_counts
from tokenbridge.models.tokenbridge.cost import count_flop
from tokenbridge.models.tokenbridge.presets import PRESETS
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling
from tokenbridge.tokenizers.cost import decoder_flop
from tokenbridge.tokenizers.kl16 import create_kl16

TINY = "tokenbridge-tiny"
runner = CliRunner()


@pytest.fixture(scope="module")
def setting() -> s.Setting:
    return s.make_setting(TINY, "cpu", s.PLANS["cpu"])


def counted(function: Callable[[], object]) -> float:
    """Count with torch, which does not see products of inference tensors."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def cost_of_l() -> s.Cost:
    return s.count_cost(PRESETS["tokenbridge-l"].model)


# -------------------------------------------------------------------------------------------------- FLOP


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("number", [0, 2, 4])
def test_counted_flop_of_a_step(setting: s.Setting, number: int, guidance_scale: float) -> None:
    config = TokenBridgeSampling(guidance_scale=guidance_scale, guidance_schedule="constant")
    step = replace(setting, config=config).step(5, number)
    flop, other = (setting.cost.iterations(5, guided=guided) for guided in (guidance_scale != 1, guidance_scale == 1))
    assert counted(step.fast) == flop["fast"][number] != other["fast"][number]
    assert counted(step.plain) == flop["reference"][number] != other["reference"][number]


def test_ceilings_of_l(cost_of_l: s.Cost) -> None:
    """How many times as fast the package would be if both paths did as many operations a second."""
    flop = {n: cost_of_l.iterations(n, guided=True) for n in (4, 64)}
    ratios = {n: sum(both["reference"]) / sum(both["fast"]) for n, both in flop.items()}
    assert ratios == {4: pytest.approx(3.30, abs=0.01), 64: pytest.approx(1.22, abs=0.01)}


# TFLOP per image of TokenBridge-L with guidance: encoder, decoder, head, VAE decoder, all; counted from the official
# code by others. The cached rows still run the last decoder block for all positions, which sampling.py does not.
TABLE = [
    (256, False, (40.9, 69.6, 5.41, 0.25, 116.2)),
    (256, True, (40.9, 69.6, 0.64, 0.25, 111.4)),
    (64, False, (8.3, 17.4, 5.41, 0.25, 31.3)),
    (64, True, (8.3, 17.4, 0.64, 0.25, 26.6)),
]


@pytest.mark.parametrize(("num_iterations", "caches_head", "expected"), TABLE)
def test_tokenbridge_of_published_size(
    num_iterations: int, caches_head: bool, expected: tuple[float, ...], cost_of_l: s.Cost
) -> None:
    head, decoder = cost_of_l.head, decoder_flop(create_kl16(), 16)
    masked_before = (256, *masked_counts(256, num_iterations)[:-1])
    passes = [cost_of_l.reference(256 - num_masked) for num_masked in masked_before]
    backbone = [2 * sum(one[part] for one in passes) for part in ("encoder", "decoder")]
    tera = [count / 1e12 for count in (*backbone, 256 * head["fast" if caches_head else "reference"], decoder)]
    places = (1, 1, 2, 2, 1)  # as many as the table gives
    assert [round(n, p) for n, p in zip([*tera, sum(tera)], places, strict=True)] == list(expected)
    preset = PRESETS["tokenbridge-l"]
    settings = replace(preset.sampling_config(), num_iterations=num_iterations)
    run_here = count_flop(s.meta_model(preset.model), settings)
    assert sum(run_here.values()) < sum(tera[:-1]) * 1e12


def test_extrapolation_is_exact_where_time_follows_flop() -> None:
    flop = [1.0, 4.0, 2.0, 8.0, 3.0]
    assert s.extrapolate([0, 4], [2.0, 6.0], flop) == pytest.approx(2 * sum(flop))
    # Twice as slow per FLOP at the end: the middle is half-way.
    assert s.extrapolate([0, 4], [1.0, 6.0], flop) == pytest.approx(1 + 1.25 * 4 + 1.5 * 2 + 1.75 * 8 + 2 * 3)


# ------------------------------------------------------------------------------------------------ command


def test_cpu_plan(tmp_path: Path) -> None:
    plan = s.Plan(whole=(3,), extrapolated=(8,), num_points=3, head_positions=16, rounds=2)
    s.run(TINY, "cpu", plan, tmp_path)
    report = json.loads((tmp_path / f"{TINY}-cpu.json").read_text())
    assert report["tokens_equal_to_reference"] >= 0.99
    assert report["dtype"] == "float32"
    kinds = [(r["what"], r["num_iterations"], r["extrapolated"]) for r in report["rows"]]
    assert kinds == [("image", 8, True), ("head", None, False), ("image", 3, False)]
    for row in report["rows"]:
        assert set(row["variants"]) == {"eager", "reference"}
        ours, theirs = row["variants"]["eager"], row["variants"]["reference"]
        assert len(ours["seconds"]) == len(theirs["seconds"]) == 2
        assert ours["ratio"] == pytest.approx(theirs["median_seconds"] / ours["median_seconds"])
        assert row["ceiling_ratio"] > 1
    points = report["rows"][0]["timed_iterations"]
    assert [p["number"] for p in points] == [0, 4, 7]
    assert points[0]["num_visible"] == 0
    assert report["rows"][1]["variants"]["eager"]["target_ratio"] == 4
    assert 0 <= report["provenance"]["share_of_other_processes"] <= 1
    table = (tmp_path / f"{TINY}-cpu.md").read_text()
    assert "| 8 iterations, images, extrapolated | 1 | eager |" in table


def test_cuda_plan_on_the_cpu(tmp_path: Path) -> None:
    """What a GPU would run, in bfloat16: eager, compiled (here by a backend that compiles nothing), reference."""
    plan = replace(s.PLANS["cuda"], whole=(16,), rounds=1, compile_backend="eager", best_batch=False)
    report = s.run(TINY, "cpu", plan, tmp_path)
    assert (report["dtype"], report["reference_autocast"]) == ("bfloat16", "bfloat16")
    (row,) = report["rows"]
    assert set(row["variants"]) == {"eager", "compiled", "reference"}
    assert (row["num_iterations"], row["batch_size"], row["extrapolated"]) == (16, 1, False)


def test_the_best_batch_is_extrapolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s, "MAX_BATCH", 2)
    monkeypatch.setattr(s, "BATCH_GAIN", 0.0)  # any batch is better than the one before
    plan = replace(s.PLANS["cuda"], whole=(2, 3), num_points=2, rounds=1, compile_backend=None)
    report = s.run(TINY, "cpu", plan, tmp_path)
    kinds = [(r["num_iterations"], r["batch_size"], r["extrapolated"]) for r in report["rows"]]
    assert kinds == [(2, 1, False), (3, 1, False), (2, 2, True), (3, 2, True)]


@torch.inference_mode()
def test_compiled_methods_are_used_and_taken_back(setting: s.Setting) -> None:
    calls = []

    def decode(*arguments: object) -> object:
        calls.append(len(arguments))
        return type(setting.fast.backbone).decode(setting.fast.backbone, *arguments)  # type: ignore[arg-type]

    step = setting.step(4, 1)
    expected = step.fast()
    variants = replace(setting, compiled={("backbone", "decode"): decode}).variants(step.fast, step.plain)
    result = variants["compiled"]()
    assert isinstance(result, torch.Tensor)
    assert torch.equal(result, expected)
    assert len(calls) == 1
    step.fast()
    assert len(calls) == 1


def test_paths_that_disagree_are_not_timed(setting: s.Setting) -> None:
    weights = {**setting.plain.weights, "decoder_norm.weight": -setting.plain.weights["decoder_norm.weight"]}
    wrong = replace(setting, plain=replace(setting.plain, weights=weights))
    plan = s.Plan(whole=(3,), extrapolated=(), rounds=1)
    with pytest.raises(RuntimeError, match="of the tokens agree"):
        s.measure(wrong, plan, TINY)


def app() -> typer.Typer:
    command = typer.Typer()
    command.command()(s.main)
    return command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_clear_error(tmp_path: Path) -> None:
    result = runner.invoke(app(), ["--device", "cuda", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "No CUDA GPU was found" in result.output
    assert not list(tmp_path.iterdir())


def test_an_unknown_device(tmp_path: Path) -> None:
    result = runner.invoke(app(), ["--device", "tpu", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "cpu and cuda" in result.output
