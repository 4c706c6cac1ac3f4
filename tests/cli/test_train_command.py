"""`tokenbridge train`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Run, error_of
from mini_scale import DATA, MINI, NOT_TRAINED, TRAINED, World, some_digits

from tokenbridge.training.scale import run_command as run_command_itself
from tokenbridge.utils.files import sha256_of
from tokenbridge.weights.diffusers import WEIGHTS_FILE


def test_unknown_recipe(run: Run) -> None:
    message = error_of(run("train", "tiny", "nonsense"))
    assert "Unknown recipe 'nonsense' at scale tiny" in message
    assert "tokenbridge-64" in message


def test_train_one_recipe(run: Run, world: World, tmp_path: Path) -> None:
    code, out, err = run("train", "mini", "classifier", "--out", tmp_path)
    assert code == 0
    assert re.match(r"classifier: loss \d+\.\d{4} after \d+ s, in ", out)
    assert "train classifier: step 5 of 5" in err
    expected = sha256_of(world.weights / "classifier" / WEIGHTS_FILE)
    assert sha256_of(tmp_path / "weights" / "classifier" / WEIGHTS_FILE) == expected


def test_train_all_runs_generators_last(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def note(arguments: list[str]) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr("tokenbridge.training.scale.run_command", note)
    monkeypatch.setattr("tokenbridge.training.scale.latents_of", lambda *_: calls.append(["latents"]))
    code, _, _ = run("train", "mini", "--out", tmp_path, "--jobs", "1", "--data", DATA)
    assert code == 0
    optional = [recipe.name for recipe in MINI.recipes if recipe.optional]
    latents = calls.pop(calls.index(["latents"]))
    assert latents  # cached once, before the generators want them
    names = [call[2] for call in calls]
    assert sorted(names) == sorted({*TRAINED, *NOT_TRAINED} - set(optional))
    is_generator = [MINI.recipe(name).is_generator for name in names]
    assert is_generator == sorted(is_generator)
    assert {tuple(call[:2] + call[3:]) for call in calls} == {("train", "mini", "--out", str(tmp_path), "--data", DATA)}


def test_codes_need_no_latents(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """LlamaGen is trained on the codes of a VQ tokenizer: no VAE is asked for, which might not be there."""
    calls: list[str] = []

    def note(arguments: list[str]) -> int:
        calls.append(arguments[2])
        return 0

    monkeypatch.setattr("tokenbridge.training.scale.run_command", note)
    code, _, err = run("train", "mini", "vq", "llamagen", "--out", tmp_path)
    assert code == 0, err
    assert calls == ["vq", "llamagen"]


def test_failed_training_stops_before_generators(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []

    def fail(arguments: list[str]) -> int:
        calls.append(arguments[2])
        return 2 if arguments[2] == "vae" else 0

    monkeypatch.setattr("tokenbridge.training.scale.run_command", fail)
    message = error_of(run("train", "mini", "--out", tmp_path, "--jobs", "2"))
    assert "1 of 3 trainings failed" in message
    assert sorted(calls) == ["classifier", "vae", "vq"]


def test_trainings_in_processes_pass_on_what_they_say(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command_itself(["train", "tiny", "nonsense"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "Unknown recipe 'nonsense'" in err


def test_other_data_in_the_same_folder_is_not_taken_for_the_same(run: Run, world: World, tmp_path: Path) -> None:
    """`--data` with as many other images is another run: its weights must not be the first ones."""
    (tmp_path / "other").mkdir()
    last = some_digits("train", 12)
    other = last.select([c * 12 + 6 + i for c in range(10) for i in range(6)])
    other.to_parquet(tmp_path / "other" / "train.parquet")
    assert run("train", "mini", "classifier", "--out", tmp_path / "runs")[0] == 0
    weights = tmp_path / "runs" / "weights" / "classifier" / WEIGHTS_FILE
    first = sha256_of(weights)
    code, _, _ = run("train", "mini", "classifier", "--out", tmp_path / "runs", "--data", tmp_path / "other")
    assert code == 2 or sha256_of(weights) != first
