"""The audit: laws of verdicts, refusals, the gate, reports, and the command on small ledgers and real tiny results."""

from __future__ import annotations

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import yaml
from builders import paper_run, record_published
from conftest import Run, error_of
from hypothesis import given
from hypothesis import strategies as st
from official_files import write_quick_inception

from tokenbridge.audit.audit import audit_claims, audit_samples
from tokenbridge.audit.expected import WORSE, Expected, gate_failures, read_expected, write_expected
from tokenbridge.audit.findings import Audit, Finding
from tokenbridge.audit.report import counts, to_junit, to_markdown, write_report
from tokenbridge.evaluation import evaluate as evaluation
from tokenbridge.reproduction import table3
from tokenbridge.results import score
from tokenbridge.results.ledger import Claim
from tokenbridge.results.schema import Row, digest_of, read, write
from tokenbridge.results.tolerances import Tolerance
from tokenbridge.results.verdicts import CLAIM_VERDICTS, RANK, judge
from tokenbridge.utils.files import reference_folder, sha256_of
from tokenbridge.weights import artifacts
from tokenbridge.weights.artifacts import ARTIFACTS, LOCK_FILE, MissingArtifactsError

SHIPPED = reference_folder()
INCEPTION_SHA256 = str(ARTIFACTS["inception"].sha256)
NEEDS = ["tokenbridge-l", "kl16", "inception", "adm-statistics", "adm-reference"]

CLAIMS: list[dict[str, Any]] = [
    {
        "id": f"table3/tokenbridge-l/{metric}",
        "text": f"TokenBridge-L, {metric}",
        "source": "arXiv 2503.16430 v1, table 3",
        "scale": "paper",
        "recipe": "tokenbridge reproduce-table3 tokenbridge-l",
        "value": value,
        "row": "table3/tokenbridge-l",
        "metric": f"{metric}-50K",
        "supported_by": ["ar-against-real"] if metric == "FID" else [],
        "needs": NEEDS if metric in ("precision", "recall") else NEEDS[:4],
        "tolerance": {"relative": 0.03, "absolute": 0.005, "reason": "spread over seeds"},
    }
    for metric, value in (("FID", 1.76), ("IS", 294.8), ("precision", 0.80), ("recall", 0.63))
] + [
    {
        "id": "table2a/ar-better",
        "text": "The autoregressive head | beats the parallel one",
        "source": "table 2a",
        "scale": "tiny",
        "recipe": "tokenbridge reproduce tiny",
        "trend": "ar-against-parallel",
    },
    {
        "id": "table5/faster",
        "text": "The AR head is faster than a diffusion head",
        "source": "table 5",
        "scale": "tiny",
        "recipe": "tokenbridge reproduce tiny",
        "trend": "ar-against-diffusion",
    },
    {
        "id": "table2e/head",
        "text": "Head of depth 4",
        "source": "table 2e",
        "scale": "counted",
        "recipe": "tokenbridge audit",
        "value": 65e6,
        "check": "head",
        "tolerance": {"relative": 0.01, "reason": "printed in millions"},
    },
    {
        "id": "text/classes",
        "text": "As many classes as levels",
        "source": "section 3",
        "scale": "counted",
        "recipe": "tokenbridge audit",
        "check": "classes",
    },
    {
        "id": "table3/var/fid",
        "text": "VAR",
        "source": "table 3",
        "scale": "paper",
        "recipe": "none",
        "value": 1.73,
        "not_applicable": "another system",
    },
]
DISCREPANCIES = [
    {"id": "size", "text": "Head size", "source": "table 2e", "checks": ["head"]},
    {"id": "orders", "text": "Levels", "source": "table 1", "rows": ["table1a/ptq-8", "table1a/ptq-64"]},
    {"id": "precision", "text": "Half precision", "source": "table 4", "not_measured": "no GPU"},
]
REFERENCES = ("fid_stats/adm_in256_stats.npz", "VIRTUAL_imagenet256_labeled.npz")
CHECKS: dict[str, Callable[[], float]] = {"head": lambda: 80_793_600.0, "classes": lambda: 1.0}
TODAY = {
    **{claim["id"]: "not run" for claim in CLAIMS[:4]},
    "table2a/ar-better": "reproduced",
    "table5/faster": "not run",
    "table2e/head": "not reproduced",
    "text/classes": "reproduced",
    "table3/var/fid": "not applicable at this scale",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a folder that has the record of the published files alone, with empty caches and no network."""
    for name in ("cwd", "hub", "torch"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv(artifacts.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    record_published(tmp_path / "cwd", "tokenbridge-l", "tokenbridge-h")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of reference results with few claims and the real tiny results, which the command takes."""
    folder = tmp_path / "shipped"
    (folder / "paper").mkdir(parents=True)
    ledger = {"claims": CLAIMS, "discrepancies": DISCREPANCIES}
    (folder / "paper" / "claims.yaml").write_text(yaml.safe_dump(ledger))
    verdicts = {id_: {"verdict": verdict} for id_, verdict in TODAY.items()}
    verdicts["table2e/head"]["reason"] = "no way of counting gives it"
    write_json(folder / "paper" / "expected.json", {"schema_version": "tokenbridge-expected/1", "verdicts": verdicts})
    (folder / "tiny").mkdir()
    (folder / "tiny" / "weights").symlink_to(SHIPPED / "tiny" / "weights")
    shutil.copy(SHIPPED / "tiny" / "results.json", folder / "tiny")
    edit(folder / "tiny" / "results.json", without_diffusion)
    monkeypatch.setattr("tokenbridge.utils.files.reference_folder", lambda: folder)
    monkeypatch.setattr("tokenbridge.audit.audit.all_checks", lambda ledger: CHECKS)
    return folder


def without_diffusion(value: dict[str, Any]) -> None:
    """Leave a row out of tiny results, and the trend that rests on it, whatever is shipped."""
    for row in value["rows"]:
        if row["id"] == "table5/diffusion":
            row.update(metrics={}, not_run="there was no time")
    value["trends"] = [trend for trend in value["trends"] if trend["id"] != "ar-against-diffusion"]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def edit(path: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> Path:
    """Change a result file; with `sign`, compute its digest anew, as a forger does."""
    value = json.loads(path.read_text())
    change(value)
    if sign:
        value["sha256"] = digest_of(value)
    write_json(path, value)
    return path


def paper_results(path: Path, *, row: str = "table3/tokenbridge-l", scale: str = "paper", **scores: float) -> Path:
    """Write what a run at the paper's scale would have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, paper_run(row.removeprefix("table3/"), **scores).model_copy(update={"scale": scale}))
    return path


def verdicts_of(done: Audit) -> dict[str, str]:
    return {finding.claim.id: finding.verdict for finding in done.findings}


def finding_of(done: Audit, id_: str) -> Finding:
    return next(finding for finding in done.findings if finding.claim.id == id_)


# ------------------------------------------------------------------------------------------------ laws of verdicts

values = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3))
widths = st.floats(0, 1e3, allow_nan=False).map(lambda x: round(x, 3))
GOODNESS = {"reproduced": 2, "within doubt": 1, "not reproduced": 0}


def tolerance_of(absolute: float) -> Tolerance:
    return Tolerance(absolute=absolute, reason="of the test")


@given(values, widths, values, widths, widths)
def test_reproduced_if_and_only_if_the_interval_is_inside(
    claimed: float, granted: float, measured: float, below: float, above: float
) -> None:
    low, high = measured - below, measured + above
    hair = 1e-9 * (1 + abs(claimed))
    verdict = judge(claimed, measured, tolerance_of(granted), (low, high))
    if claimed - granted + hair <= low and high <= claimed + granted - hair:
        assert verdict == "reproduced"
    if low < claimed - granted - hair or high > claimed + granted + hair:
        assert verdict != "reproduced"
    if high < claimed - granted - hair or low > claimed + granted + hair:
        assert verdict == "not reproduced"
    if verdict == "not reproduced":
        assert high <= claimed - granted + hair or low >= claimed + granted - hair
    # Without an interval there is no doubt.
    assert judge(claimed, measured, tolerance_of(granted)) != "within doubt"


@given(values, widths, values, widths, widths, widths)
def test_further_away_is_never_better(
    claimed: float, granted: float, measured: float, below: float, above: float, step: float
) -> None:
    away = step if measured >= claimed else -step
    before = judge(claimed, measured, tolerance_of(granted), (measured - below, measured + above))
    moved = measured + away
    after = judge(claimed, moved, tolerance_of(granted), (moved - below, moved + above))
    if before == "not reproduced":
        assert after == "not reproduced"
    assert (
        GOODNESS[judge(claimed, moved, tolerance_of(granted))]
        <= GOODNESS[judge(claimed, measured, tolerance_of(granted))]
    )


@given(values, widths, values, widths, widths)
def test_more_tolerance_is_never_worse_and_a_wider_interval_never_surer(
    claimed: float, granted: float, measured: float, width: float, more: float
) -> None:
    interval = (measured - width, measured + width)
    verdict = judge(claimed, measured, tolerance_of(granted), interval)
    assert GOODNESS[judge(claimed, measured, tolerance_of(granted + more), interval)] >= GOODNESS[verdict]
    wider = judge(claimed, measured, tolerance_of(granted), (interval[0] - more, interval[1] + more))
    assert wider in (verdict, "within doubt")


def test_without_tolerance_a_count_is_exact() -> None:
    assert judge(486_889_472, 486_889_472, None) == "reproduced"
    assert judge(3_893_027_840, 3_893_027_841, None) == "not reproduced"
    assert judge(0.22, 1.33 - 1.11, None) == "reproduced"  # which is 0.2200000000000002


# -------------------------------------------------------------------------------------------------- the small ledger


def test_verdicts_of_the_small_ledger(shipped: Path) -> None:
    done = audit_claims(checks=CHECKS)
    assert verdicts_of(done) == TODAY
    assert done.failures == ()
    fid = finding_of(done, "table3/tokenbridge-l/FID")
    for text in ("no result file has FID-50K", "tokenbridge-l from https://huggingface.co", fid.claim.recipe):
        assert text in fid.why
    (support,) = fid.support
    assert re.fullmatch(r"at tiny scale: .* holds \([\d.]+ <= 4\)", support)
    stored = read(shipped / "tiny" / "results.json")
    ar = finding_of(done, "table2a/ar-better")
    assert (ar.measured, ar.evidence) == (next(t.measured for t in stored.trends if t.id == "ar-against-parallel"), 0)
    faster = finding_of(done, "table5/faster").why
    missing = "the trend ar-against-diffusion rests on table5/diffusion: there was no time"
    assert faster == f"{missing}. To run it: tokenbridge reproduce tiny"
    head = finding_of(done, "table2e/head")
    assert head.why == "80,793,600 against 65,000,000, asked within 650,000: printed in millions"
    assert finding_of(done, "table3/var/fid").why == "another system"
    (evidence,) = done.evidence
    assert evidence.file == "reference_results/tiny/results.json"
    assert evidence.sha256 == sha256_of(shipped / "tiny" / "results.json")
    num_hashes = len(stored.provenance.weights_sha256) + 2  # training and test images
    assert evidence.notes == (f"{num_hashes} hashes of weights and images compared with the files here",)
    size, orders, precision = done.effects
    assert size.checks == {"head": 80_793_600.0}
    assert [row.id for row in orders.rows] == ["table1a/ptq-8", "table1a/ptq-64"]
    assert (orders.evidence, precision.evidence) == (0, None)


@pytest.mark.parametrize(
    ("metrics", "verdict"),
    [
        ({"FID_50K": 1.78, "FID_low": 1.75, "FID_high": 1.80}, "reproduced"),
        ({"FID_50K": 1.78}, "reproduced"),
        ({"FID_50K": 1.80, "FID_low": 1.76, "FID_high": 1.84}, "within doubt"),
        ({"FID_50K": 1.83, "FID_low": 1.79, "FID_high": 1.87}, "within doubt"),
        ({"FID_50K": 1.90, "FID_low": 1.86, "FID_high": 1.94}, "not reproduced"),
        ({"FID_50K": 1.90}, "not reproduced"),
        ({"IS_50K": 294.8}, "not run"),
    ],
)
def test_a_number_of_the_paper(shipped: Path, tmp_path: Path, metrics: dict[str, Any], verdict: str) -> None:
    done = audit_claims([paper_results(tmp_path / "results.json", **metrics)], checks=CHECKS)
    finding = finding_of(done, "table3/tokenbridge-l/FID")
    assert finding.verdict == verdict
    if "FID_50K" in metrics:
        assert finding.measured == metrics["FID_50K"]
        assert finding.evidence is not None
        assert done.evidence[finding.evidence].file == str(tmp_path / "results.json")
        assert done.evidence[finding.evidence].notes == (
            "5 hashes of weights and images compared with the files here",
            f"of a published hash: inception, {REFERENCES[0]}",
            f"recorded here, no hash was published: generator, vae, {REFERENCES[1]}",
        )
    if "FID_low" in metrics:
        assert finding.interval == (metrics["FID_low"], metrics["FID_high"])
        assert "95 % interval" in finding.why
    assert finding.support  # of the tiny models, beside it
    assert bool(done.failures) == (verdict == "not reproduced")


@pytest.mark.parametrize(
    ("scale", "settings", "reason"),
    [
        ("stand-in: no result", {}, "stand-in"),
        ("evaluation", {}, "of scale evaluation"),
        (
            "paper",
            {"num_images": 5000, "run": {"num_images": 5000, "num_made": 5000, "seconds": 2500}},
            "50,000 images",
        ),
        ("paper", {"published Inception weights": False}, "not by the published Inception"),
    ],
)
def test_what_never_counts(shipped: Path, tmp_path: Path, scale: str, settings: dict[str, Any], reason: str) -> None:
    path = paper_results(tmp_path / "results.json", scale=scale, FID_50K=1.76)

    def change(value: dict[str, Any]) -> None:
        value["provenance"]["settings"] |= settings
        value["rows"][0]["metrics"]["images"] = value["provenance"]["settings"]["num_images"]

    edit(path, change)
    finding = finding_of(audit_claims([path], checks=CHECKS), "table3/tokenbridge-l/FID")
    assert finding.verdict == "not run"
    assert reason in finding.why


def test_tiny_results_decide_no_number_of_the_paper(shipped: Path) -> None:
    """Not even if they have a row and a metric of its name."""

    def change(value: dict[str, Any]) -> None:
        row = next(row for row in value["rows"] if row["id"] == "table3/tokenbridge")
        value["rows"].append({**row, "id": "table3/tokenbridge-l", "metrics": {"FID-50K": 1.76}})

    edit(shipped / "tiny" / "results.json", change)
    assert verdicts_of(audit_claims(checks=CHECKS)) == TODAY


# ------------------------------------------------------------------------------------------------------- the files


def test_the_order_of_files_changes_nothing(shipped: Path, tmp_path: Path) -> None:
    files = [
        paper_results(tmp_path / "a.json", FID_50K=1.78),
        paper_results(tmp_path / "b.json", row="table3/tokenbridge-h", FID_50K=1.55),
        Path(shutil.copy(shipped / "tiny" / "results.json", tmp_path / "c.json")),
    ]
    first, second = (audit_claims(f, checks=CHECKS) for f in (files, files[::-1]))
    assert first.model_copy(update={"made": ""}) == second.model_copy(update={"made": ""})
    assert [e.file for e in first.evidence] == [
        "reference_results/tiny/results.json",  # the copy of it is the same evidence
        str(tmp_path / "a.json"),
        str(tmp_path / "b.json"),
    ]


def test_two_files_about_one_row_are_refused(shipped: Path, tmp_path: Path) -> None:
    files = [paper_results(tmp_path / name, FID_50K=fid) for name, fid in (("a.json", 1.78), ("b.json", 1.90))]
    for order in (files, files[::-1]):
        with pytest.raises(
            ValueError, match=r"a\.json and .*b\.json both measured table3/tokenbridge-l at scale paper"
        ):
            audit_claims(order, checks=CHECKS)
    # The same numbers are one measurement; and a row that was not run is none.
    shutil.copy(files[0], files[1])
    assert len(audit_claims(files, checks=CHECKS).evidence) == 2
    paper_results(files[1], FID_50K=1.90)
    edit(files[1], lambda value: value["rows"][0].update(metrics={}, not_run="no time"))
    assert finding_of(audit_claims(files, checks=CHECKS), "table3/tokenbridge-l/FID").verdict == "reproduced"


def test_a_newer_run_stands_in_for_the_shipped_one(shipped: Path) -> None:
    own = Path("runs/tiny/results.json")
    own.parent.mkdir(parents=True)
    shutil.copy(shipped / "tiny" / "results.json", own)
    edit(own, lambda value: value["provenance"].update(started="2020-01-01T00:00:00+00:00"))
    (old,) = audit_claims(checks=CHECKS).evidence
    assert old.file == "reference_results/tiny/results.json"
    assert old.notes[-1] == "runs/tiny/results.json is older and was left out"
    edit(own, lambda value: value["provenance"].update(started="2126-01-01T00:00:00+00:00"))
    done = audit_claims(checks=CHECKS)
    (new,) = done.evidence
    assert (new.file, new.notes[-1]) == ("runs/tiny/results.json", "stands in for reference_results/tiny/results.json")
    assert done.failures == ()

    def off(value: dict[str, Any]) -> None:
        value["rows"][0]["metrics"]["SSIM"] += 0.01

    edit(own, off)
    (failure,) = audit_claims(checks=CHECKS).failures
    assert failure.startswith("runs/tiny/results.json: table1a/vae is not that of reference_results/tiny/results.json")
    assert audit_claims(checks=CHECKS, fail_on=["within doubt"]).failures == ()
    # Files that are named are taken alone.
    assert audit_claims([shipped / "tiny" / "results.json"], checks=CHECKS).evidence[0].file == old.file


def test_a_trend_is_computed_not_read(shipped: Path) -> None:
    """Rows that contradict the claim, signed anew and with their trends left out: the claim falls."""

    def worse(value: dict[str, Any]) -> None:
        for row in value["rows"]:
            if row["id"] == "table2a/autoregressive":
                row["metrics"]["FID-digits"] = 0.7
        value["trends"] = []

    edit(shipped / "tiny" / "results.json", worse)
    done = audit_claims(checks=CHECKS)
    finding = finding_of(done, "table2a/ar-better")
    assert finding.verdict == "not reproduced"
    assert "does not hold" in finding.why
    assert len(done.failures) == 1


def metric_by_one(value: dict[str, Any]) -> None:
    value["rows"][0]["metrics"]["PSNR"] += 1


def trend_up(value: dict[str, Any]) -> None:
    value["trends"][0]["measured"] = 0.9999


def trend_bound(value: dict[str, Any]) -> None:
    value["trends"][2]["bound"] = 1.0


def trend_made_up(value: dict[str, Any]) -> None:
    value["trends"].append({**value["trends"][0], "id": "better-than-all"})


def other_weights(value: dict[str, Any]) -> None:
    value["provenance"]["weights_sha256"]["vae/diffusion_pytorch_model.safetensors"] = "0" * 64


def other_images(value: dict[str, Any]) -> None:
    value["provenance"]["data_sha256"]["digits/test"] = "0" * 64


def own_images(value: dict[str, Any]) -> None:
    value["provenance"]["data_sha256"] = {"mine/train": "0" * 64, "mine/test": "0" * 64}


def metric_gone(value: dict[str, Any]) -> None:
    for row in value["rows"]:
        if row["id"] == "table3/real":
            row["metrics"].pop("FID-digits")


def no_metric(value: dict[str, Any]) -> None:
    metric_gone(value)
    for row in value["rows"]:
        if row["id"] == "table3/real":
            row["metrics"].pop("FID-cleanfid-digits")


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], bool, str]] = {
    "metric": (metric_by_one, False, "was changed after it was written"),
    "metric, signed": (metric_by_one, True, "the trend ptq-lossless says"),
    "NaN": (lambda value: value["rows"][0]["metrics"].update(PSNR=math.nan), False, "rows.0.metrics.PSNR"),
    "infinity": (lambda value: value["rows"][0]["metrics"].update(PSNR=math.inf), False, "rows.0.metrics.PSNR"),
    "other schema": (lambda value: value.update(schema_version="tokenbridge-results/9"), True, "schema_version"),
    "no digest": (lambda value: value.pop("sha256"), False, "no digest"),
    "unknown metric": (lambda value: value["rows"][0]["metrics"].update(x=1.0), True, "unknown metric 'x'"),
    "trend": (trend_up, True, "the trend ptq-lossless says 0.9999 >= 0.95, but from the rows follows 0.99"),
    "bound": (trend_bound, True, "the trend ar-against-parallel"),
    "trend made up": (trend_made_up, True, "better-than-all"),
    "weights": (other_weights, True, "was measured with vae/diffusion_pytorch_model.safetensors"),
    "no weights": (lambda value: value["provenance"].update(weights_sha256={}), True, "does not say what weights"),
    "weights made up": (
        lambda value: value["provenance"].update(weights_sha256={"better/model.safetensors": "0" * 64}),
        True,
        "that are not on this machine: better/model.safetensors",
    ),
    "images": (other_images, True, "was measured with digits/test"),
    "own images": (own_images, True, "names no digits/train"),
    "metric of a trend": (no_metric, True, "lack metrics"),
    "row twice": (lambda value: value["rows"].append(value["rows"][0]), True, "rows twice"),
}


@pytest.mark.parametrize("case", [*REFUSED, "truncated", "missing"])
@pytest.mark.usefixtures("shipped")
def test_a_file_is_refused_with_one_reason(run_command: Run, tmp_path: Path, case: str) -> None:
    path = Path(shutil.copy(SHIPPED / "tiny" / "results.json", tmp_path / "theirs.json"))
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        message = "cut off"
    elif case == "missing":
        path.unlink()
        message = "no result file"
    else:
        change, sign, message = REFUSED[case]
        edit(path, change, sign=sign)
    error = error_of(run_command("audit", path))
    assert message in error
    assert str(path) in error
    assert not Path("runs").exists()  # nothing half-written


@pytest.mark.usefixtures("shipped")
def test_a_byte_of_a_metric_flipped(run_command: Run, tmp_path: Path) -> None:
    path = Path(shutil.copy(SHIPPED / "tiny" / "results.json", tmp_path / "theirs.json"))
    content = path.read_bytes()
    digit = re.search(rb'"PSNR": \d\d\.\d*(\d)', content)
    assert digit is not None
    flipped = bytes([content[digit.start(1)] ^ 1])
    path.write_bytes(content[: digit.start(1)] + flipped + content[digit.end(1) :])
    assert "was changed after it was written" in error_of(run_command("audit", path))


def test_hashes_that_nothing_here_can_prove(shipped: Path, tmp_path: Path) -> None:
    """Neither a good number nor a bad one decides anything while the files behind it are unknown here."""
    Path(LOCK_FILE).unlink()
    for fid in (1.76, 9.0):
        done = audit_claims([paper_results(tmp_path / "results.json", FID_50K=fid)], checks=CHECKS)
        found = finding_of(done, "table3/tokenbridge-l/FID")
        assert found.verdict == "within doubt"
        assert found.why.startswith("the SHA-256 of its generator is neither published nor recorded here; ")
        assert "not here to compare: generator, vae" in done.evidence[1].notes[-1]
        assert done.failures == ()


@pytest.mark.parametrize(
    "name", ["inception", "vae", "generator", "fid_stats/adm_in256_stats.npz", "VIRTUAL_imagenet256_labeled.npz"]
)
def test_hashes_of_published_files(shipped: Path, tmp_path: Path, name: str) -> None:
    """Against what is published, or recorded here at first use."""
    path = paper_results(tmp_path / "results.json", FID_50K=1.76)
    part = "data_sha256" if name.endswith("npz") else "weights_sha256"

    def other(value: dict[str, Any]) -> None:
        value["provenance"][part][name] = "9" * 64
        sampler = value["provenance"]["settings"]["sampler"]["weights"]
        sampler |= {name: "9" * 64} if name in sampler else {}

    edit(path, other)
    with pytest.raises(ValueError, match=rf"results\.json was measured with {re.escape(name)} of SHA-256 9999"):
        audit_claims([path], checks=CHECKS)


def test_results_of_own_weights_need_their_folder(shipped: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(SHIPPED / "tiny" / "weights", own)
    changed = own / "vq" / "config.json"
    changed.write_text(changed.read_text() + "\n")
    path = Path(shutil.copy(SHIPPED / "tiny" / "results.json", tmp_path / "mine.json"))
    edit(path, lambda value: value["provenance"]["weights_sha256"].update({"vq/config.json": sha256_of(changed)}))
    with pytest.raises(ValueError, match="name their folder with --weights"):
        audit_claims([path], checks=CHECKS)
    done = audit_claims([path], weights=own, checks=CHECKS)
    assert [e.file for e in done.evidence] == [str(path)]


# --------------------------------------------------------------------------------------------------------- the gate

verdicts = st.sampled_from(CLAIM_VERDICTS)


def finding(verdict: Any, id_: str = "a/b") -> Finding:
    claim = Claim.model_validate({**CLAIMS[0], "id": id_})
    return Finding(claim=claim, verdict=verdict, why="because")


@given(verdicts, verdicts)
def test_the_gate_fails_where_a_verdict_is_worse(stored: Any, today: Any) -> None:
    expected = {"a/b": Expected(verdict=stored, reason="known")}
    failures = gate_failures([finding(today)], expected, [WORSE])
    assert bool(failures) == (RANK[today] > RANK[stored])
    assert not gate_failures([finding(stored)], expected, [WORSE])


@given(verdicts, st.sets(verdicts))
def test_the_gate_fails_on_named_verdicts(today: Any, named: set[Any]) -> None:
    assert bool(gate_failures([finding(today)], {}, named)) == (today in named)


def test_claims_without_a_stored_verdict_and_verdicts_without_a_claim() -> None:
    assert gate_failures([finding("within doubt")], {}, [WORSE]) == []
    assert len(gate_failures([finding("not reproduced")], {}, [WORSE])) == 1
    gone = {"c/d": Expected(verdict="not run")}
    assert gate_failures([], gone, [WORSE]) == ["c/d has a stored verdict, but there is no such claim"]
    assert gate_failures([], gone, [WORSE], whole=False) == []


def test_accepted_verdicts_keep_their_reasons(shipped: Path) -> None:
    path = shipped / "paper" / "expected.json"
    done = audit_claims(checks={**CHECKS, "classes": lambda: 0.0})
    assert [failure.split(" is ")[0] for failure in done.failures] == ["text/classes"]
    write_expected(path, done, "the paper says otherwise")
    expected = read_expected(path)
    assert expected["table2e/head"].reason == "no way of counting gives it"
    assert expected["text/classes"] == Expected(verdict="not reproduced", reason="the paper says otherwise")
    assert expected.keys() == TODAY.keys()
    assert audit_claims(checks={**CHECKS, "classes": lambda: 0.0}).failures == ()
    with pytest.raises(ValueError, match="for a reason"):
        write_expected(path, done, " ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "--accept"),
        (lambda path: path.write_text("{"), "not a file of expected verdicts"),
        (lambda path: path.write_text("[]"), "schema_version"),
        (lambda path: path.write_text(path.read_text().replace("expected/1", "expected/2")), "schema_version"),
        (lambda path: path.write_text(path.read_text().replace("not run", "not walked")), "not a file of expected"),
        (lambda path: path.write_text(path.read_text().replace("no way of counting gives it", "")), "no reason"),
    ],
)
def test_damaged_expectations(shipped: Path, change: Callable[[Path], Any], message: str) -> None:
    change(shipped / "paper" / "expected.json")
    with pytest.raises(ValueError, match=message) as caught:
        audit_claims(checks=CHECKS)
    assert "expected.json" in str(caught.value)
    assert verdicts_of(audit_claims(checks=CHECKS, fail_on=["within doubt"])) == TODAY


def test_the_shipped_ledger_and_its_stored_verdicts() -> None:
    """The audit of this project, as CI runs it: green, and every known failure has a reason of its own."""
    done = audit_claims()
    expected = read_expected(SHIPPED / "paper" / "expected.json")
    assert done.failures == ()
    assert verdicts_of(done) == {id_: entry.verdict for id_, entry in expected.items()}
    known = {id_: entry.reason for id_, entry in expected.items() if entry.verdict == "not reproduced"}
    assert all(len(reason.split()) >= 5 for reason in known.values()), known
    for found in done.findings:
        if found.claim.scale == "paper":
            assert found.verdict in ("not run", "not applicable at this scale")  # no published weights are here
            assert found.measured is None


# ------------------------------------------------------------------------------------------------------ the reports


@pytest.fixture
def done(shipped: Path, tmp_path: Path) -> Audit:
    path = paper_results(tmp_path / "results.json", FID_50K=1.80, FID_low=1.76, FID_high=1.84, IS_50K=200.0)
    return audit_claims([path], checks=CHECKS)


def test_reports_agree(done: Audit, shipped: Path) -> None:
    write_report(done, "out", reference=shipped)
    assert {path.name for path in Path("out").iterdir()} == {"audit.md", "audit.json", "junit.xml", "index.html"}
    assert Audit.model_validate_json(Path("out/audit.json").read_text()) == done
    found = Counter(verdicts_of(done).values())
    assert counts(done) == {verdict: found[verdict] for verdict in CLAIM_VERDICTS}
    assert sum(counts(done).values()) == len(CLAIMS)

    lines = Path("out/audit.md").read_text().splitlines()
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    assert {c[0]: int(c[1]) for c in cells if len(c) == 2 and c[1].isdigit()} == counts(done)
    assert Counter(c[3] for c in cells if len(c) == 4 and c[3] in CLAIM_VERDICTS) == found
    assert ["TokenBridge-L, FID", "1.76", "1.8 (1.76 to 1.84)", "within doubt"] in cells
    assert any(c[0] == "The autoregressive head \\| beats the parallel one" for c in cells)
    assert "not measured: no GPU" in "\n".join(lines)

    suites = ET.parse("out/junit.xml").getroot()
    claims, gate = suites.findall("testsuite")
    cases = {case.get("name"): case for case in claims}
    assert set(cases) == set(TODAY)
    rank: dict[str, int] = {str(verdict): place for verdict, place in RANK.items()}
    worse = {id_ for id_, verdict in verdicts_of(done).items() if rank[verdict] > rank[TODAY[id_]]}
    assert worse == {"table3/tokenbridge-l/IS"}
    for id_, verdict in verdicts_of(done).items():
        properties, *rest = cases[id_]
        assert {p.get("name"): p.get("value") for p in properties} == {"verdict": verdict, "stored verdict": TODAY[id_]}
        tags = [child.tag for child in rest]
        assert tags == (["failure"] if id_ in worse else [] if verdict == "reproduced" else ["skipped"])
    assert int(claims.get("failures", "")) == len(worse)
    assert int(claims.get("tests", "")) == len(CLAIMS)
    assert int(claims.get("skipped", "")) == len(CLAIMS) - found["reproduced"] - len(worse)
    assert gate.get("failures") == "1"  # Inception Score, which was expected not to run
    assert cases["table3/tokenbridge-l/FID"][1].get("message", "").startswith("within doubt: 1.8 (95 % interval")


def test_junit_of_texts_that_xml_cannot_hold(done: Audit) -> None:
    first = done.findings[0].model_copy(update={"why": 'a\x00b <&" \ud800'})
    case = ET.fromstring(to_junit(done.model_copy(update={"findings": (first,)}))).find("testsuite/testcase/skipped")
    assert case is not None
    assert str(case.get("message")).endswith('a�b <&" �')


def test_the_users_own_tables_are_told_from_the_shipped_ones(done: Audit) -> None:
    """By where the file comes from, whatever its path; discrepancies have no pictures."""
    assert done.own_run is None
    tiny = next(file for file in done.evidence if file.scale == "tiny")

    def with_own(**changes: Any) -> Audit:
        own = tiny.model_copy(update={"file": "reference_results/tiny/results.json", "origin": "given", **changes})
        return done.model_copy(update={"evidence": (*done.evidence, own)})

    assert with_own().own_run == Path("reference_results/tiny")
    assert with_own(scale="paper").own_run is None
    assert with_own(rows=(Row(id="discrepancies/a", label="a", metrics={}),)).own_run is None


def test_markdown_says_why_the_gate_fails(done: Audit) -> None:
    page = to_markdown(done)
    assert "## The gate fails" in page
    assert all(failure in page for failure in done.failures)
    assert "The gate fails" not in to_markdown(done.model_copy(update={"failures": ()}))


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command(run_command: Run, shipped: Path, tmp_path: Path) -> None:
    code, out, _ = run_command("audit")
    assert code == 0
    assert re.search(r"not run\W+5\b", out)
    assert "table2e/head: not reproduced: 80,793,600 against 65,000,000" in out
    assert "runs/audit/index.html" in out
    assert Path("runs/audit/index.html").is_file()
    code, out, _ = run_command("audit", "--json", "--out", "elsewhere", "--fail-on", "not reproduced")
    assert code == 1
    printed = Audit.model_validate_json(out)
    assert [failure.split(" is ")[0] for failure in printed.failures] == ["table2e/head"]
    path = paper_results(tmp_path / "results.json", FID_50K=1.95)
    code, out, _ = run_command("audit", path)
    assert code == 1
    assert "The gate fails: table3/tokenbridge-l/FID is not reproduced, stored is not run" in out
    assert run_command("audit", path, "--accept", "known since today")[0] == 0
    assert run_command("audit", path)[0] == 0
    assert read_expected(shipped / "paper" / "expected.json")["table3/tokenbridge-l/FID"].reason == "known since today"
    assert run_command("audit")[0] == 0  # not run is better than contradicted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail-on", "worst"], "not on 'worst'"),
        (["--samples", "x"], "--samples and --claim go together"),
        (["--claim", "x"], "--samples and --claim go together"),
        (["--samples", "x", "--claim", "table9/x"], "no claim 'table9/x'"),
        (["--samples", "x", "--claim", "table2e/head"], "not a claim that samples decide"),
        (["--samples", "x", "--claim", "table3/tokenbridge-l/FID"], "x is neither a folder of images"),
        (["--samples", "images.npz", "--claim", "table3/tokenbridge-l/FID"], "2 files are missing"),
        (["--samples", "images.npz", "--claim", "table3/tokenbridge-l/recall"], "3 files are missing"),
        (["--accept", " "], "for a reason"),
        (["--out", "images.npz/audit"], "images.npz/audit cannot be written to"),
    ],
)
@pytest.mark.usefixtures("shipped")
def test_bad_input(run_command: Run, arguments: list[str], message: str) -> None:
    np.savez("images.npz", arr_0=np.zeros((2, 256, 256, 3), np.uint8))
    code, out, err = run_command("audit", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not Path("runs").exists()


# ------------------------------------------------------------------------------------------------- someone's samples

FEW_IMAGES = 6


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    write_quick_inception(file)
    return file


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=np.random.RandomState(1).randint(0, 256, (FEW_IMAGES, 256, 256, 3), dtype=np.uint8))
    return path


@pytest.fixture
def folder(tmp_path: Path, inception: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random statistics under the published names, whose hashes are declared for this test."""
    root = tmp_path / "artifacts"
    root.mkdir()
    features = np.random.RandomState(0).standard_normal((4096, 2048)).astype(np.float32)
    statistics = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    np.savez(root / ARTIFACTS["adm-statistics"].file, **statistics)
    (root / ARTIFACTS["inception"].file).symlink_to(inception)
    monkeypatch.setitem(ARTIFACTS, "inception", replace(ARTIFACTS["inception"], sha256=sha256_of(inception), size=None))
    monkeypatch.setitem(ARTIFACTS, "adm-statistics", replace(ARTIFACTS["adm-statistics"], git_sha1=None))
    return root


def test_fewer_samples_decide_nothing(
    run_command: Run, shipped: Path, samples: Path, folder: Path, inception: Path
) -> None:
    """Nor do scores by other Inception weights; both are labelled."""
    command = ["audit", "--samples", samples, "--claim", "table3/tokenbridge-l/FID", "--folder", folder]
    code, out, _ = run_command(*command, "--num-bootstrap", "0", "--other-inception", inception)
    assert code == 0
    assert f"FID ({FEW_IMAGES} images)" in out or f"FID-other-inception ({FEW_IMAGES} images)" in out
    assert "decides no number of the paper: the paper's numbers are of 50,000 images" in out
    done = Audit.model_validate_json(Path("runs/audit/audit.json").read_text())
    assert set(verdicts_of(done)) == {claim["id"] for claim in CLAIMS[:4]}
    for found in done.findings:
        assert found.verdict == "not run"
        assert "the paper's numbers are of 50,000 images" in found.why


def test_samples_judge_a_row(
    shipped: Path, samples: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, run_command: Run
) -> None:
    """The number of images that decides is made small; the rest is what 50,000 go through."""
    for module in (score, table3):
        monkeypatch.setattr(module, "NUM_IMAGES", FEW_IMAGES)
    monkeypatch.setattr(evaluation, "FEW", FEW_IMAGES)
    done = audit_samples(samples, "table3/tokenbridge-l/FID", out="out", folder=folder, num_bootstrap=3, checks=CHECKS)
    found = {f.claim.id.rpartition("/")[2]: f for f in done.findings}
    assert [found[name].verdict for name in ("FID", "IS")] == ["not reproduced"] * 2
    assert found["FID"].interval is not None
    assert found["precision"].verdict == found["recall"].verdict == "not run"
    assert len(done.failures) == 2
    stored = read("out/results.json")
    assert found["FID"].measured == stored.rows[0].metrics["FID-50K"]
    # The file that it leaves is evidence for a later audit; and what was measured, claimed, is reproduced.
    again = audit_claims(["out/results.json"], folder=folder, checks=CHECKS)
    assert finding_of(again, "table3/tokenbridge-l/FID").measured == found["FID"].measured
    ledger = yaml.safe_load((shipped / "paper" / "claims.yaml").read_text())
    ledger["claims"][0]["value"] = found["FID"].measured
    (shipped / "paper" / "claims.yaml").write_text(yaml.safe_dump(ledger))
    again = audit_claims(["out/results.json"], folder=folder, checks=CHECKS)
    assert verdict_of_fid(again) in ("reproduced", "within doubt")


def verdict_of_fid(done: Audit) -> str:
    return finding_of(done, "table3/tokenbridge-l/FID").verdict


def test_samples_of_another_size(shipped: Path, folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((4, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="64 x 64 pixels"):
        audit_samples(tmp_path / "small.npz", "table3/tokenbridge-l/FID", out="out", folder=folder)
    assert not Path("out").exists()


def test_precision_needs_the_images_too(shipped: Path, samples: Path, folder: Path) -> None:
    with pytest.raises(MissingArtifactsError) as caught:
        audit_samples(samples, "table3/tokenbridge-l/precision", out="out", folder=folder)
    assert [missing.artifact.key for missing in caught.value.missing] == ["adm-reference"]
