"""Estimates of a run: time, disk, what is missing; the operations are those of test_flop.py."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenbridge.cli import main as cli
from tokenbridge.sampling.config import RunConfig
from tokenbridge.sampling.load import find_model
from tokenbridge.sampling.plan import hours_in_words, measure_matmul, plan_run
from tokenbridge.sampling.sample import choose_run, plan_sampling


def test_plan_adds_up(tmp_path: Path) -> None:
    system = find_model("tokenbridge-tiny")
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


@pytest.mark.parametrize(
    ("hours", "words"),
    [(30_712.3, "30,700"), (1.5e6, "1,500,000"), (99.96, "100"), (99.9, "99.9"), (0.42, "0.4"), (0.0031, "0.003")],
)
def test_hours_are_plain_numbers(hours: float, words: str) -> None:
    assert hours_in_words(hours) == words


def test_named_files_that_are_not_there_are_missing(tmp_path: Path) -> None:
    model, config = choose_run("tokenbridge-l", weights=tmp_path / "none.pth", vae=tmp_path)
    planned = plan_sampling(model, config, tmp_path / "out")
    assert planned.missing == (f"there is no {tmp_path}/none.pth",)
    assert planned.next == ()  # the user named them


def test_command_plans_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["sample", "tokenbridge-l", "--num-images", "50000", "--plan", "--out", str(out)]
    for options in (["--json"], [], ["--stand-in"]):
        monkeypatch.setattr(sys, "argv", ["tokenbridge", *arguments, *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert bool(stop.value.code) == (options != ["--stand-in"])  # two files are missing; a stand-in needs none
        text, _ = capfd.readouterr()
        if options == ["--json"]:
            plan = json.loads(text)
            assert (plan["num_images"], plan["num_iterations"]) == (50_000, 256)
            assert plan["tflop_per_image"]["total"] == pytest.approx(107.76, abs=0.01)
            assert [line.split(":")[0] for line in plan["missing"]] == ["tokenbridge-l", "kl16"]
            assert plan["next"] == ["tokenbridge artifacts tokenbridge-l kl16 --download"]
        else:
            assert "TFLOP per image" in text
            assert ("tokenbridge artifacts tokenbridge-l kl16 --download" in text) == (options == [])
    assert not out.exists()
