"""The commands `evaluate` and `reference`, and the result file of an evaluation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from scored_images import LABEL, NUM_SAMPLES, SIZE, folder_of, random_images

from tokenbridge.cli import main as cli
from tokenbridge.evaluation.evaluate import Evaluation, ScoredSet
from tokenbridge.reproduction import evaluation
from tokenbridge.results import markdown
from tokenbridge.results import schema as results
from tokenbridge.results.score import Score
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
    line = ("evaluate", root / "seed0", "--reference", root / "reference", "--allow-few")
    assert run_command(monkeypatch, *line) == 2
    assert "weights-inception-2015-12-05-6726825d.pth" in capsys.readouterr().err


def scored_set(name: str, fid: float) -> ScoredSet:
    scores = (Score("FID", fid, num_images=18, low=1.0, high=3.0, bias=0.5), Score("IS", 5.0, num_images=18, std=0.1))
    return ScoredSet(name, 18, scores, (Score("FID-cleanfid-legacy", 2 * fid, num_images=18),))


def test_rows_of_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file says nothing but what `evaluate` found, in the order that the command prints."""
    evaluated = Evaluation(
        sets=(scored_set("a", 2.0), scored_set("b", 3.0)),
        not_run={("precision", "recall", "KID"): "no images", ("FID-cleanfid-clean",): "only statistics"},
        notes=("FID is biased.",),
        data_sha256={"a": "00", "reference": "11"},
        weights_sha256={"inception": "22"},
        settings={"bootstrap": 2},
    )
    evaluate = Mock(return_value=evaluated)
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(sys, "argv", ["tokenbridge", "evaluate"])
    measured = evaluation.measure_evaluation(["a", "b"], "reference", seed=5, allow_few=True)
    evaluate.assert_called_once_with(["a", "b"], "reference", seed=5, allow_few=True)
    assert [(row.id, row.label, row.not_run) for row in measured.rows] == [
        ("evaluation/1", "a", None),
        ("evaluation/2", "b", None),
        ("evaluation/mean", "mean of 2", None),
        ("evaluation/std", "standard deviation", None),
        ("evaluation/precision, recall, KID", "precision, recall, KID", "no images"),
        ("evaluation/FID-cleanfid-clean", "FID-cleanfid-clean", "only statistics"),
    ]
    first, second, mean, deviation = (list(row.metrics.items()) for row in measured.rows[:4])
    of = "(18 images)"
    assert first == [
        ("images", 18),
        *((f"FID {of}", 2.0), (f"IS {of}", 5.0), (f"IS-std {of}", 0.1)),
        *((f"FID-low {of}", 1.0), (f"FID-high {of}", 3.0), (f"FID-bias {of}", 0.5)),
        (f"FID-cleanfid-legacy {of}", 4.0),
    ]
    assert dict(second)[f"FID {of}"] == 3.0
    assert mean == [(f"FID {of}", 2.5), (f"IS {of}", 5.0), (f"FID-cleanfid-legacy {of}", 5.0)]
    assert dict(deviation) == pytest.approx({f"FID {of}": 0.5**0.5, f"IS {of}": 0, f"FID-cleanfid-legacy {of}": 2**0.5})
    p = measured.provenance
    assert (p.seed, p.data_sha256, p.weights_sha256) == (5, evaluated.data_sha256, evaluated.weights_sha256)
    assert p.settings == {"bootstrap": 2, "notes": ["FID is biased."]}
