"""`tokenbridge reproduce` at a scale; other targets are in test_targets.py."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, error_of
from mini_scale import World

from tokenbridge.results.schema import Results, digest_of, read


def test_missing_weights(run: Run, world: World, tmp_path: Path) -> None:
    message = error_of(run("reproduce", "mini", "--weights", tmp_path / "none", "--reference", world.reference))
    assert f"No model of the scale mini is in {tmp_path / 'none'}." in message
    assert "tokenbridge train" in message


def test_bad_reference_is_found_before_anything_runs(run: Run, world: World, tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text(world.reference.read_text()[:-100])
    for path, what in ((tmp_path / "cut.json", "not JSON"), (tmp_path / "none.json", "no result file")):
        code, out, err = run("reproduce", "mini", "--weights", world.weights, "--reference", path)
        message = error_of((code, out, err))
        assert what in message
        assert str(path) in message
        assert "Table 1" not in err


def test_number_of_images_is_a_multiple_of_the_classes(run: Run, world: World) -> None:
    for number in ("7", "0", "-10"):
        message = error_of(run("reproduce", "mini", "--num-images", number, "--reference", world.reference))
        assert "multiple of 10 classes" in message


def test_message_may_hold_brackets(run: Run, tmp_path: Path) -> None:
    """Brackets in a path are no markup, neither the kind that vanishes nor the kind that is an error."""
    for name in ("[bold]", "[1]", "a [", "[red"):
        message = error_of(run("reproduce", "mini", "--reference", tmp_path / name))
        assert str(tmp_path / name) in message


def reproduce_arguments(world: World, out: Path, reference: Path) -> list[str | Path]:
    return [
        *("reproduce", "mini", "--weights", world.weights, "--out", out),
        *("--reference", reference, "--num-images", "20"),
    ]


def write_signed(path: Path, value: dict[str, Any]) -> None:
    """Write a result file with the digest of what is now in it."""
    path.write_text(json.dumps({**value, "sha256": digest_of(value)}))


@pytest.fixture
def own_times(monkeypatch: pytest.MonkeyPatch, world: World, tmp_path: Path) -> Path:
    """Fix the times of table 5, and return the first results with these times in them."""
    slow, fast = [4.0, 4.5, 5.0], [1.0, 1.5, 2.0]
    times = itertools.cycle([slow, fast, slow, fast, fast])  # uncached, cached, diffusion, mixture, softmax
    monkeypatch.setattr("tokenbridge.reproduction.timing._milliseconds", lambda function, runs: next(times))
    value = json.loads(world.reference.read_text())
    for row in value["rows"]:
        if row["id"].startswith("table5"):
            ratio = 1.0 if row["id"].endswith(("uncached", "diffusion")) else 3.0
            row["metrics"] |= {name: ratio for name in ("speed-up", "against diffusion") if name in row["metrics"]}
    path = tmp_path / "reference.json"
    write_signed(path, value)
    return path


def test_reproduced_is_exit_0_and_json_is_json(run: Run, world: World, tmp_path: Path, own_times: Path) -> None:
    code, out, err = run(*reproduce_arguments(world, tmp_path / "out", own_times), "--json")
    value = json.loads(out)  # and nothing else on stdout
    assert code == 0
    judged = {entry["id"]: entry["verdict"] for entry in value.pop("verdicts")}
    assert set(judged.values()) == {"reproduced", "not run"}
    assert list(judged) == [row.id for row in world.results.rows]
    assert Results.model_validate(value) == read(tmp_path / "out" / "results.json")
    assert value["provenance"]["command"].startswith("tokenbridge reproduce mini --weights")
    assert "Table 1: reconstruction" in err
    assert "Not run: Files are missing. generator of mini/parallel-64: there is no " in err


def test_tampered_number_is_exit_1_and_named(run: Run, world: World, tmp_path: Path, own_times: Path) -> None:
    value = json.loads(own_times.read_text())
    [row] = [row for row in value["rows"] if row["id"] == "table1a/ptq-16"]
    row["metrics"]["PSNR"] += 0.06  # the tolerance is 0.05
    write_signed(own_times, value)
    code, out, _ = run(*reproduce_arguments(world, tmp_path / "out", own_times))
    assert code == 1
    assert re.search(r"^table1a/ptq-16: not reproduced: PSNR [\d.]+ against [\d.]+$", out, re.MULTILINE)
    assert re.search(r"^24 reproduced, 1 not reproduced, 5 not run\.", out, re.MULTILINE)
    assert "Table 1a." in out
    assert "The paper's argument at this scale" in out
    for text in ("post-training, 16 levels", "FID-digits", "seconds per image"):
        assert text in out  # nothing is cut off where there is no terminal
    page = (tmp_path / "out" / "tables.md").read_text()
    assert "- post-training, 16 levels: not reproduced: PSNR" in page


def test_reasons_may_hold_brackets(run: Run, world: World, tmp_path: Path, own_times: Path) -> None:
    """A reason may hold anything: brackets are no markup."""
    value = json.loads(own_times.read_text())
    extra = {"id": "table9/[dim]a[/b]", "label": "[", "metrics": {"PSNR": 1.0}, "not_run": None}
    write_signed(own_times, {**value, "rows": [*value["rows"], extra]})
    code, out, err = run(*reproduce_arguments(world, tmp_path / "out", own_times))
    assert "Traceback" not in err
    assert code == 1
    assert "table9/[dim]a[/b]: not reproduced: only the reference has this row" in out
