"""Honest result files: what the commands write at the paper's scale decides claims, for every published model.

The files are composed by the very code of a run. Only its hours are left out: the models have no weights (meta device),
and the scores are those that were published.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from builders import RECORDED, record_published

from tokenbridge.audit.audit import audit_claims
from tokenbridge.audit.paper import contradiction, doubts, known_hashes
from tokenbridge.models.registry import all_presets, find_preset, unpublished
from tokenbridge.reproduction import table3
from tokenbridge.reproduction.options import Options
from tokenbridge.results.ledger import published_metrics
from tokenbridge.results.schema import read
from tokenbridge.results.score import Score, read_name
from tokenbridge.sampling.load import ModelSampler, as_tokenizer, find_model, on_meta
from tokenbridge.sampling.run import RunReport
from tokenbridge.utils import provenance
from tokenbridge.weights import artifacts
from tokenbridge.weights.artifacts import ARTIFACTS

PUBLISHED = [name for name, (_, preset) in all_presets().items() if unpublished(preset) is None]


USUAL = {"FID": 3.0, "FID-cleanfid": 3.0, "IS": 250.0, "precision": 0.8, "recall": 0.6, "KID": 0.001}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in an empty folder, with empty caches and no network, in a clean checkout, after a day."""
    for name in ("cwd", "hub", "torch", "artifacts"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv(artifacts.FOLDER_VARIABLE, str(tmp_path / "artifacts"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = {"commit": "0" * 40, "dirty": False, "started": "2025-01-01T00:00:00+00:00"}
    record = {**provenance.Stopwatch().record(), **commit, "wall_seconds": 90_000.0}
    monkeypatch.setattr(provenance, "Stopwatch", lambda: SimpleNamespace(record=lambda: record))


def reproduce(name: str, monkeypatch: pytest.MonkeyPatch, *, num_made: int = 50_000, **options: Any) -> Path:
    """Run a row of table 3 without its hours, and return the result file."""
    system, preset = find_preset(name)
    files = Path("../artifacts")
    record_published(files, name)
    weights = {"generator": RECORDED["generator"], system.recipe: RECORDED["tokenizer"]}
    model = find_model(name, variant=options.get("variant"))
    sampler = ModelSampler(
        name, system, on_meta(system.model, preset.model), as_tokenizer(system.tokenizer.create()), model.settings,
        "bf16", weights,
    )  # fmt: skip
    report = RunReport(Path("out/samples/images"), 50_000, num_made, 0.5 * num_made, 2.0, 1.0)
    inception = SimpleNamespace(published=True, sha256=ARTIFACTS["inception"].sha256, extractor=None)

    def evaluate(samples: list[Path], reference: Path, **_: Any) -> SimpleNamespace:
        claimed = {read_name(metric).metric: value for metric, value in published_metrics(f"table3/{name}").items()}
        scores = [
            Score(metric, claimed.get(metric.removesuffix("-cleanfid"), usual)) for metric, usual in USUAL.items()
        ]
        not_run: dict[tuple[str, ...], str] = {}
        if "stats" in reference.name:  # they have no images, so precision and recall are not run
            scores, not_run = scores[:3], {("precision", "recall", "KID"): "it has only mu and sigma"}
        scores[0] = replace(scores[0], low=0.99 * scores[0].value, high=1.01 * scores[0].value, bias=0.01)
        of_reference = "adm-statistics" if "stats" in reference.name else "adm-reference"
        hashes = {str(samples[0]): "4" * 64, str(reference): RECORDED[of_reference]}
        return SimpleNamespace(
            sets=[SimpleNamespace(scores=tuple(scores))], not_run=not_run, data_sha256=hashes, notes=()
        )

    monkeypatch.setattr(artifacts, "resolve", lambda keys, **_: {key: files / ARTIFACTS[key].file for key in keys})
    monkeypatch.setattr(table3, "load_inception", lambda *_, **__: inception)
    monkeypatch.setattr(table3, "load_reference", lambda *_, **__: None)
    monkeypatch.setattr(table3, "sample_model", lambda *_, **__: SimpleNamespace(sampler=sampler, report=report))
    monkeypatch.setattr(table3, "evaluate", evaluate)
    assert table3.reproduce_table3(name, Options(**options), out="out", show_progress=False) is not None
    return Path("out/results.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_is_open_in_the_file_of_a_whole_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = read(reproduce(name, monkeypatch))
    assert contradiction(results) is None
    for score in table3.SCORES:
        assert doubts(results, results.rows[0], f"{score}-50K", known_hashes(results)) == []
    # The same once more, resumed and without precision and recall, whose reference batch is then not named.
    resumed = read(reproduce(name, monkeypatch, num_made=0, precision_recall=False))
    assert contradiction(resumed) is None
    (row,) = resumed.rows
    assert doubts(resumed, row, "FID-50K", known_hashes(resumed)) == []
    assert doubts(resumed, row, "recall-50K", known_hashes(resumed)) == ["the file names no reference batch"]


@pytest.mark.parametrize(
    ("name", "variant"),
    [("tokenbridge-l", "official"), ("tokenbridge-l", "paper"), ("mar-b", "official"), ("mar-b", "unguided"),
     ("llamagen-b-384", "official"), ("givt-causal-256", "official")],
)  # fmt: skip
def test_the_audit_decides_by_it(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = reproduce(name, monkeypatch, variant=variant)
    done = audit_claims([path], row=f"table3/{name}", fail_on=(), checks={})
    verdicts = {f.verdict for f in done.findings if f.claim.metric in ("FID-50K", "IS-50K")}
    # Published scores are those of guided images.
    assert verdicts == {"within doubt" if variant == "unguided" else "reproduced"}
