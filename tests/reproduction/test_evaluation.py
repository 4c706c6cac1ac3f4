"""The commands `evaluate` and `reference`, and the result file of an evaluation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from scored_images import LABEL, NUM_SAMPLES, SIZE, folder_of, random_images

from tokenbridge.cli import main as cli
from tokenbridge.evaluation.evaluate import evaluate
from tokenbridge.reproduction.evaluation import measure_evaluation
from tokenbridge.results import markdown
from tokenbridge.results import schema as results
from tokenbridge.weights.artifacts import FOLDER_VARIABLE

pytest_plugins = ("scored_images",)
pytestmark = pytest.mark.usefixtures("quick_root")


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tokenbridge", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_commands(
    root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ("--inception", weights, "--allow-other-inception")
    source, statistics = root / "more-images", tmp_path / "statistics.npz"
    folder_of(source, random_images(10, 3))
    assert run_command(monkeypatch, "reference", source, "--out", statistics, "--image-size", SIZE, *other) == 0
    assert "Statistics of 3 images" in capsys.readouterr().out

    out = tmp_path / "results.json"
    common = ("evaluate", root / "seed0", "--reference", statistics, *other, "--cache", root / "features")
    assert run_command(monkeypatch, *common) == 2  # too few
    assert "--allow-few" in capsys.readouterr().err
    assert run_command(monkeypatch, *common, "--allow-few", "--num-bootstrap", 2, "--out", out) == 0
    printed = capsys.readouterr().out
    assert f"FID{LABEL}" in printed
    assert "precision, recall, KID: not run:" in printed
    assert "biased" in printed
    stored = results.read(out)
    assert stored.rows[0].metrics["FID" + LABEL] > 0
    assert stored.provenance.data_sha256.keys() == {str(root / "seed0"), str(statistics)}
    assert stored.provenance.command.startswith("tokenbridge evaluate")
    assert "FID" in markdown.to_markdown(stored, None)

    assert run_command(monkeypatch, *common, "--allow-few", "--num-bootstrap", 0, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["metrics"]["images"] == NUM_SAMPLES


def test_the_command_names_missing_weights(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert run_command(monkeypatch, "evaluate", root / "seed0", "--reference", root / "reference") == 2
    assert "weights-inception-2015-12-05-6726825d.pth" in capsys.readouterr().err


def test_rows_of_an_evaluation(root: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file says nothing but what `evaluate` found, in the order that the command prints."""
    monkeypatch.setattr(sys, "argv", ["tokenbridge", "evaluate"])
    samples = [root / "seed0", root / "seed1"]
    options["num_bootstrap"] = 2
    measured = measure_evaluation(samples, root / "reference", seed=5, **options)
    evaluated = evaluate(samples, root / "reference", seed=5, **options)
    first, second, mean, deviation, cleanfid = measured.rows
    names = ("FID", "FID-cleanfid", "IS", "IS-std", "precision", "recall", "KID", "KID-std")
    ends = ("FID-low", "FID-high", "FID-bias")
    assert list(first.metrics) == list(second.metrics) == ["images", *(name + LABEL for name in (*names, *ends))]
    assert [first.metrics, second.metrics] == [{"images": NUM_SAMPLES, **one.metrics} for one in evaluated.sets]
    assert list(mean.metrics) == list(deviation.metrics) == [n + LABEL for n in names if not n.endswith("-std")]
    assert mean.metrics["FID" + LABEL] == (first.metrics["FID" + LABEL] + second.metrics["FID" + LABEL]) / 2
    assert [row.id for row in measured.rows] == [
        *(f"evaluation/{name}" for name in ("1", "2", "mean", "std")),
        "evaluation/FID-cleanfid-legacy, FID-cleanfid-clean",
    ]
    assert [mean.label, deviation.label] == ["mean of 2", "standard deviation"]
    assert cleanfid.not_run is not None
    p = measured.provenance
    assert (p.seed, p.data_sha256, p.weights_sha256) == (5, evaluated.data_sha256, evaluated.weights_sha256)
    assert p.settings["samples"] == {"sets": 2, "images": NUM_SAMPLES, "size": [SIZE, SIZE]}
    assert p.settings["reference"]["statistics"] == "computed here"
    assert p.settings["notes"] == list(evaluated.notes)
