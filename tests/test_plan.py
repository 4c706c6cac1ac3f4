"""Estimates of a run: operations against torch's own count and the published table, disk, what is missing."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenbridge import cli
from tokenbridge.official import create_kl16
from tokenbridge.plan import measure_matmul, plan_run, tokenbridge_flop
from tokenbridge.presets import PRESETS
from tokenbridge.run import RunConfig
from tokenbridge.sampling import SamplingConfig, generate_tokens, image_noise
from tokenbridge.systems import find_system

SHIPPED = ROOT / "reference_results"
SMALL_VAE = create_kl16(embed_dim=4, ch=32, ch_mult=(1, 1), num_res_blocks=1)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("position_order", ["random", "confidence"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_type": "parallel"},
        {"decoder_width": 48, "decoder_num_heads": 3, "mlp_ratio": 3.0, "encoder_depth": 3, "num_buffer": 5},
    ],
)
def test_count_is_torch_s(guidance_scale: float, position_order: Any, changes: dict[str, Any]) -> None:
    """Exactly: the same products, counted by torch while it makes an image."""
    model = tiny_model(**changes)
    sampling = SamplingConfig(5, guidance_scale, position_order=position_order)
    noise = image_noise(0, [0], model.num_positions, model.num_channels)
    # The plain attention is two products, which every version of torch counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        generate_tokens(model, torch.tensor([1]), sampling, noise)
    ours = tokenbridge_flop({**TINY, **changes}, sampling, SMALL_VAE)
    assert ours["encoder"] + ours["decoder"] + ours["head"] == counter.get_total_flops()
    other = tokenbridge_flop({**TINY, **changes}, sampling, SMALL_VAE, skips_last_block=False)
    assert other["decoder"] > ours["decoder"]  # mutation: what the loop skips would be seen


# TFLOP per image of TokenBridge-L with guidance: encoder, decoder, head, VAE decoder, all; counted from the official
# code by others. The cached rows still run the last decoder block for all positions, which sampling.py does not.
TABLE = [
    (256, False, (40.9, 69.6, 5.41, 0.25, 116.2)),
    (256, True, (40.9, 69.6, 0.64, 0.25, 111.4)),
    (64, False, (8.3, 17.4, 5.41, 0.25, 31.3)),
    (64, True, (8.3, 17.4, 0.64, 0.25, 26.6)),
]


@pytest.mark.parametrize(("num_iterations", "caches_head", "expected"), TABLE)
def test_published_size(num_iterations: int, caches_head: bool, expected: tuple[float, ...]) -> None:
    preset = PRESETS["tokenbridge-l"]
    sampling = replace(preset.sampling_config(), num_iterations=num_iterations)
    counted = tokenbridge_flop(preset.model, sampling, create_kl16(), skips_last_block=False, caches_head=caches_head)
    tera = [count / 1e12 for count in counted.values()]
    places = (1, 1, 2, 2, 1)  # as many as the table gives
    assert [round(n, p) for n, p in zip([*tera, sum(tera)], places, strict=True)] == list(expected)
    run_here = tokenbridge_flop(preset.model, sampling, create_kl16())
    assert sum(run_here.values()) < sum(counted.values())


def test_plan_adds_up(tmp_path: Path) -> None:
    system = find_system("tokenbridge-tiny", shipped=SHIPPED)
    config = RunConfig(3000)
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": "fp32", "missing": ["this"]}
    one = plan_run(system, config, tmp_path / "not" / "there", num_processes=1, **options)
    assert not (tmp_path / "not").exists()
    assert one.disk_bytes == 3000 * 32 * 32
    assert 0 < one.free_bytes
    assert one.hours == pytest.approx(
        sum(one.flop_per_image.values()) * 3000 / one.matmul_flop_per_second / 3600, rel=1e-12
    )
    assert replace(one, num_processes=4).hours == pytest.approx(one.hours / 4)
    two = plan_run(system, replace(config, format="npz"), tmp_path, num_processes=1, **options)
    assert two.disk_bytes == 2 * 3 * one.disk_bytes  # parts and file, three channels each
    assert ("missing", "this") in one.rows()
    assert "NOT ENOUGH" in dict(replace(one, free_bytes=10).rows())["disk"]


def test_matmul_is_timed() -> None:
    assert 1e8 < measure_matmul(torch.device("cpu"), torch.float32) < 1e14


def test_command_plans_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["sample", "tokenbridge-l", "--num-images", "50000", "--plan", "--out", str(out)]
    for options in (["--json"], [], ["--stand-in"]):
        monkeypatch.setattr(sys, "argv", ["tokenbridge", *arguments, *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        text, _ = capfd.readouterr()
        if options == ["--json"]:
            plan = json.loads(text)
            assert (plan["num_images"], plan["num_iterations"]) == (50_000, 256)
            assert plan["tflop_per_image"]["total"] == pytest.approx(107.76, abs=0.01)
            assert [line.split(":")[0] for line in plan["missing"]] == [
                "generator of tokenbridge-l",
                "VAE of tokenbridge-l",
            ]
        else:
            assert "TFLOP per image" in text
            assert ("--weights" in text) == (options == [])
    assert not out.exists()
