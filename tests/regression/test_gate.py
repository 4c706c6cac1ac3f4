"""The gate: green on the stored references, red on whatever breaks them; and references that change by record only."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from builders import RECORD
from conftest import ROOT, error_of

from tokenbridge.audit.expected import write_expected
from tokenbridge.configs import scales as recipes
from tokenbridge.configs.schema import Scale
from tokenbridge.configs.tiny import TINY
from tokenbridge.data.sources import load_images
from tokenbridge.models import noise
from tokenbridge.models.noise import ImageNoise
from tokenbridge.regression import gate, ratios, references
from tokenbridge.regression.gate import Check, Part
from tokenbridge.regression.ratios import Ratio, Ratios
from tokenbridge.reproduction.small_scale import reproduce_scale
from tokenbridge.reproduction.timing import prediction_time_rows
from tokenbridge.reproduction.trends import trends
from tokenbridge.results import schema as results
from tokenbridge.results.schema import Results, Row, read
from tokenbridge.tokenizers.quantizer import ScalarQuantizer
from tokenbridge.utils.files import reference_folder
from tokenbridge.utils.locks import LOCK, FolderInUseError, locked
from tokenbridge.weights.diffusers import WEIGHTS_FILE

if TYPE_CHECKING:
    from collections.abc import Callable

    from builders import RECORD
from conftest import Run

SHIPPED = reference_folder()
GOLDENS = ("tokenbridge-quantizer-64", "tokenbridge-head-sampling-logits", "kl16-vae")
MODELS = ("vae", "vq", "classifier", "tokenbridge-64")
CLAIMS = [
    {
        "id": "counted/tokenbridge-l",
        "text": "parameters of TokenBridge-L",
        "source": "counted with the official code",
        "scale": "counted",
        "recipe": "tokenbridge audit",
        "value": 486_889_472,
        "check": "parameters/tokenbridge-l",
    },
    {
        "id": "trend/ptq-beats-vq",
        "text": "post-training quantisation reconstructs better than a trained VQ",
        "source": "table 1a",
        "scale": "tiny",
        "recipe": "nox -s reproduce_tiny",
        "trend": "ptq-beats-vq",
    },
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scale]:
    """References of a scale with the shipped models and few digits, and three golden cases."""
    root = tmp_path_factory.mktemp("gate")
    folder, data = root / "reference_results", root / "digits"
    data.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        patch.setattr(
            "tokenbridge.reproduction.timing.prediction_time_rows", functools.partial(prediction_time_rows, runs=5)
        )
        for split, per_class in (("train", 6), ("test", 3)):
            digits = load_images("digits", split)
            step = len(digits) // 10
            digits.select([c * step + i for c in range(10) for i in range(per_class)]).to_parquet(
                data / f"{split}.parquet"
            )
        scale = replace(TINY, name="tiny", data=str(data))
        for name in GOLDENS:
            (folder / "goldens").mkdir(parents=True, exist_ok=True)
            shutil.copy(SHIPPED / "goldens" / f"{name}.npz", folder / "goldens")
        sums = (SHIPPED / "goldens" / "SHA256SUMS").read_text().splitlines(keepends=True)
        (folder / "goldens" / "SHA256SUMS").write_text("".join(x for x in sums if Path(x.split()[1]).stem in GOLDENS))
        weights = folder / "weights"
        for name in MODELS:
            shutil.copytree(SHIPPED / "tiny" / "weights" / name, weights / name)
        reproduce_scale(scale, weights=weights, out=folder / "tiny", reference=None, num_images=20)
        weights.rename(folder / "tiny" / "weights")
        (folder / "paper").mkdir()
        (folder / "paper" / "claims.yaml").write_text(yaml.safe_dump({"claims": CLAIMS}))
        patch.setitem(recipes.SCALES, "tiny", scale)
        write_expected(folder / "paper" / "expected.json", gate.audit_of(folder, None, fail_on=()), "of few digits")
    return folder, scale


@pytest.fixture
def stored(made: tuple[Path, Scale], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the references, to break."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("tokenbridge.reproduction.timing.prediction_time_rows", quiet_times)
    monkeypatch.setitem(recipes.SCALES, "tiny", made[1])
    return shutil.copytree(made[0], tmp_path / "reference_results")


@pytest.fixture
def scale(made: tuple[Path, Scale]) -> Scale:
    return made[1]


def quiet_times(bench: Any) -> list[Any]:
    """Give the stored times: those of a machine that runs tests are no ratio to judge by."""
    return [row for row in read(bench.weights.parent / "results.json").rows if row.table == "table5"]


def bad(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if check.verdict not in ("pass", "skipped")}


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def some_ratios(failed: tuple[str, ...] = (), **values: float) -> Ratios:
    origin = ratios.Origin(**RECORD, share_of_other_processes=0.0)
    return Ratios(
        provenance=origin, ratios={k: Ratio(test=f"test_{k}", runs=(v,)) for k, v in values.items()}, failed=failed
    )


# --------------------------------------------------------------------------------------------------- the gate


def test_nothing_broken_is_green(stored: Path, scale: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of every test below."""
    monkeypatch.setattr(ratios, "measure", lambda **_: some_ratios(head=5.1))
    ratios.write(stored / "benchmarks" / "ratios.json", some_ratios(head=5.0))
    parts = gate.run_gate(scale, stored, tmp_path / "out")
    assert [part.name for part in parts] == list(gate.PARTS)
    for part in parts:
        assert part.verdict == "pass", part
    rows = read(stored / "tiny" / "results.json").rows
    assert {row.id for row in rows} <= {check.name for check in parts[1].checks}
    assert {check.name for check in parts[1].checks if check.verdict == "skipped"} == {r.id for r in rows if r.not_run}
    assert [check.name for check in parts[2].checks] == ["tokenbridge-64"]
    assert {check.name: check.why.split(",")[0] for check in parts[3].checks} == {
        "counted/tokenbridge-l": "reproduced",
        "trend/ptq-beats-vq": "reproduced",
    }
    assert gate.exit_code(parts) == 0
    assert "trend/ptq-beats-vq" in (tmp_path / "out" / "audit" / "index.html").read_text()


def test_a_changed_codebook_value_is_red(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ScalarQuantizer.__init__

    def changed(self: ScalarQuantizer, codebook: torch.Tensor, **options: Any) -> None:
        codebook = codebook.clone()
        codebook[20] += 0.01 * (codebook[21] - codebook[20])
        original(self, codebook, **options)

    assert bad(gate.goldens(stored / "goldens")) == set()
    monkeypatch.setattr(ScalarQuantizer, "__init__", changed)
    assert bad(gate.goldens(stored / "goldens")) == {"tokenbridge-quantizer-64"}


def test_a_lost_or_exchanged_golden_is_red(stored: Path) -> None:
    lost = stored / "goldens" / f"{GOLDENS[0]}.npz"
    lost.unlink()
    assert bad(gate.goldens(stored / "goldens")) == {GOLDENS[0]}
    shutil.copy(stored / "goldens" / f"{GOLDENS[1]}.npz", lost)  # a case that passes, under another's name
    assert bad(gate.goldens(stored / "goldens")) == {GOLDENS[0]}


def test_a_swapped_modulation_is_red_end_to_end(stored: Path, tmp_path: Path) -> None:
    """In a copy of the package, by the command; the cases without a head stay green."""
    shutil.copytree(ROOT / "tokenbridge", tmp_path / "tokenbridge")
    head = tmp_path / "tokenbridge" / "models" / "tokenbridge" / "heads.py"
    source, line = head.read_text(), "scale, shift = self.channel_final.adaLN_modulation"
    assert source.count(line) == 1
    head.write_text(source.replace(line, "shift, scale = self.channel_final.adaLN_modulation"))
    done = subprocess.run(
        [sys.executable, "-m", "tokenbridge", "gate", "goldens", "--references", stored, "--out", tmp_path / "out"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r"goldens .* 2 of 3 .* fail ", done.stdout)
    assert "goldens, tokenbridge-head-sampling-logits: fail: logits: " in done.stdout
    (failure,) = ET.parse(tmp_path / "out" / "junit.xml").findall(".//failure")
    assert failure.get("message", "").startswith("logits: ")


def test_a_changed_seed_is_red(stored: Path, scale: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = noise.image_noise

    def other(seed: int, *arguments: Any) -> ImageNoise:
        return original(seed + 1, *arguments)

    monkeypatch.setattr("tokenbridge.models.tokenbridge.sampling.image_noise", other)
    assert bad(gate.tokens(scale, stored / "tiny")) == {"tokenbridge-64"}
    failed = bad(gate.tiny(scale, stored / "tiny", tmp_path / "out"))
    assert {"table2a/autoregressive", "table3/tokenbridge"} <= failed
    assert not any(name.startswith("table1") for name in failed)  # nothing is drawn there


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (lambda file: file["rows"][0]["metrics"].update(PSNR=file["rows"][0]["metrics"]["PSNR"] + 0.1), "table1a/vae"),
        (lambda file: file["trends"][0].update(measured=0.999), "stored trends"),
        (lambda file: file["trends"].pop(), "stored trends"),
        (lambda file: file["rows"][1]["metrics"].pop("SSIM"), "table1a/ptq-8"),
        (lambda file: file["rows"].pop(2), "table1a/ptq-16"),
        (
            lambda file: file["provenance"]["weights_sha256"].update({f"vq/{WEIGHTS_FILE}": "0" * 64}),
            f"weights vq/{WEIGHTS_FILE}",
        ),
        (
            lambda file: file["provenance"]["data_sha256"].update(dict.fromkeys(file["provenance"]["data_sha256"], "")),
            "images",
        ),
    ],
    ids=["metric", "trend", "trend gone", "metric gone", "row gone", "hash of weights", "hash of images"],
)
def test_a_tampered_result_is_red(
    stored: Path,
    scale: Scale,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], object],
    failed: str,
) -> None:
    """By measuring again, whatever a file says of its own integrity."""
    value = read(stored / "tiny" / "results.json").model_dump()
    change(value)
    forged = Results.model_validate(value)
    monkeypatch.setattr(results, "read", lambda path: forged)
    found = bad(gate.tiny(scale, stored / "tiny", tmp_path / "out", quick=True))
    assert any(name.startswith(failed) for name in found)
    assert all(name.startswith((failed, "stored trends")) for name in found)  # a trend may rest on the number


@pytest.mark.parametrize(
    ("change", "why"),
    [(lambda text: text[:-20], "cut off?"), (lambda text: text.replace('"seed": 0', '"seed": 1'), "was changed after")],
)
def test_a_damaged_result_is_red(
    stored: Path, scale: Scale, tmp_path: Path, change: Callable[[str], str], why: str
) -> None:
    file = stored / "tiny" / "results.json"
    text = file.read_text()
    assert change(text) != text
    file.write_text(change(text))
    (part,) = gate.run_gate(scale, stored, tmp_path / "out", parts=["tiny"], quick=True)
    assert part.verdict == "not run"
    assert why in part.why
    assert gate.exit_code([part]) == 2


def test_a_verdict_that_turns_is_red(stored: Path, tmp_path: Path) -> None:
    """The parameters of a model are counted from the code; a trend follows from rows."""
    assert bad(gate.audit(stored, tmp_path / "out")) == set()
    ledger = stored / "paper" / "claims.yaml"
    ledger.write_text(ledger.read_text().replace("486889472", "486889473"))
    (check,) = (check for check in gate.audit(stored, tmp_path / "out") if check.verdict == "fail")
    assert check.name == "counted/tokenbridge-l"
    assert check.why.startswith("not reproduced, stored is reproduced: ")


def test_the_audit_judges_what_was_measured_now(
    stored: Path, scale: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate that measures audits those results, with `--quick` the stored ones; a tampered file is refused."""

    def worse(reference: Results) -> list[Row]:
        """Swap what the two tokenizers lose."""
        rows = {row.id: row for row in reference.rows}
        vq, ptq = rows["table1a/vq"], rows["table1a/ptq-64"]
        rows |= {
            vq.id: vq.model_copy(update={"metrics": ptq.metrics}),
            ptq.id: ptq.model_copy(update={"metrics": vq.metrics}),
        }
        return list(rows.values())

    def measured(*arguments: Any, out: Path, **options: Any) -> tuple[Results, None]:
        stored_results = read(stored / "tiny" / "results.json")
        rows = worse(stored_results)
        done = stored_results.model_copy(update={"rows": rows, "trends": trends(rows)})
        results.write(out / "results.json", done)
        return done, None

    monkeypatch.setattr(gate, "reproduce_scale", measured)
    parts = gate.run_gate(scale, stored, tmp_path / "out", parts=["tiny", "audit"])
    assert "trend/ptq-beats-vq" in bad(list(parts[1].checks))
    quick = gate.run_gate(scale, stored, tmp_path / "quick", parts=["audit"], quick=True)
    assert gate.exit_code(quick) == 0
    file = stored / "tiny" / "results.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    (part,) = gate.run_gate(scale, stored, tmp_path / "quick", parts=["audit"], quick=True)
    assert part.verdict == "not run"
    assert "was changed after" in part.why


def test_tampered_tokens_are_red(stored: Path, scale: Scale) -> None:
    tokens = stored / "tiny" / "tokens.json"
    edit(tokens, lambda file: file["tokenbridge-64"].__setitem__(slice(3), file["tokenbridge-64"][3:6]))
    assert bad(gate.tokens(scale, stored / "tiny")) == {"tokenbridge-64"}
    edit(tokens, lambda file: file.update(givt=[[0.5]]))
    assert bad(gate.tokens(scale, stored / "tiny")) == {"tokenbridge-64", "givt"}


def test_share_of_equal_tokens_and_latents() -> None:
    assert gate.share_equal([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75
    assert gate.share_equal([0.5, -1.0], [0.5 + gate.LATENTS / 2, -1.0 + 2 * gate.LATENTS]) == 0.5
    assert gate.share_equal([1, 2], [1, 2, 3]) == 0.0


NAPS = """
import time

def test_nap(side_by_side):
    side_by_side("nap", lambda: time.sleep({fast}), lambda: time.sleep(0.1), rounds=3)
"""


WRONG = """
import pytest

@pytest.mark.parametrize("name", ["a b"])
def test_wrong(name):
    assert name == "FAILED x"

def test_without_its_fixture(no_such_fixture):
    pass
"""


def test_a_slowed_benchmark_is_red_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pytest-benchmark, on naps."""
    root, path = tmp_path / "checkout", tmp_path / "ratios.json"
    (root / "benchmarks").mkdir(parents=True)
    (root / "benchmarks" / "__init__.py").touch()
    shutil.copy(ROOT / "benchmarks" / "conftest.py", root / "benchmarks")
    naps = root / "benchmarks" / "test_naps.py"
    naps.write_text(NAPS.format(fast=0.02))
    measured = ratios.measure(root=root)
    assert measured.ratios["nap"].test == "benchmarks/test_naps.py::test_nap"
    assert 3 < measured.ratios["nap"].middle < 6
    assert measured.failed == ()
    ratios.write(path, measured)
    naps.write_text(NAPS.format(fast=0.05) + WRONG)
    assert ratios.measure(root=root).failed == (
        "benchmarks/test_naps.py::test_wrong[a b]",
        "benchmarks/test_naps.py::test_without_its_fixture",
    )
    naps.write_text(NAPS.format(fast=0.05))
    monkeypatch.setattr(ratios, "NUM_RUNS", 1)
    (check,) = gate.benchmarks(path, root)
    assert check.verdict == "fail"
    assert re.fullmatch(r"slower: [12]\.\d\dx, stored [345]\.\d\dx \(.*\); at least [234]\.\d\dx is asked", check.why)


@pytest.mark.parametrize(("runs", "verdict"), [([3.4, 3.4, 3.4], "fail"), ([3.4, 3.4, 3.6], "pass"), ([3.6], "pass")])
def test_what_is_slow_once_is_measured_again(
    runs: list[float], verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios.write(tmp_path / "ratios.json", some_ratios(head=5.0, other=2.0))
    left, asked = iter(runs), list[list[str]]()

    def measure(*tests: list[str], root: Path) -> Ratios:
        asked.append(*tests or [[]])
        return some_ratios(head=next(left)) if tests else some_ratios(head=next(left), other=2.1)

    monkeypatch.setattr(ratios, "measure", measure)
    found = {check.name: check.verdict for check in gate.benchmarks(tmp_path / "ratios.json")}
    assert found == {"head": verdict, "other": "pass"}
    assert asked == [[], *[["test_head"]] * (len(runs) - 1)]


def test_the_lowest_stored_run_is_what_is_kept_up_with() -> None:
    stored = Ratio(test="t", runs=(9.0, 4.0, 5.0))
    assert stored.middle == 5.0
    assert ratios.compare(Ratio(test="t", runs=(2.79,)), stored)[0] is False
    assert ratios.compare(Ratio(test="t", runs=(1.0, 2.81)), stored)[0] is True
    both = ratios.merge(some_ratios(("a",), head=5.0, old=1.0), some_ratios(("a", "b"), head=3.0))
    assert (both.ratios["head"].runs, both.ratios["old"].runs, both.failed) == ((5.0, 3.0), (1.0,), ("a", "b"))


def test_benchmarks_that_cannot_be_judged_are_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ratios.json"
    assert gate.run_part("benchmarks", lambda: gate.benchmarks(path)).verdict == "not run"
    ratios.write(path, some_ratios(head=5.0, gone=2.0))
    measured = some_ratios(failed=("benchmarks/test_speed_head.py::test_head",), head=5.0, new=3.0)
    monkeypatch.setattr(ratios, "measure", lambda *tests, root: measured)
    failed = {check.name: check.why for check in gate.benchmarks(path) if check.verdict == "fail"}
    assert failed == {
        "benchmarks/test_speed_head.py::test_head": "the test fails; its message is above",
        "gone": "only stored, not measured",
        "new": "only measured, not stored",
    }


def test_benchmarks_need_a_checkout_and_pytest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run in a checkout only"):
        ratios.measure(root=tmp_path)
    (tmp_path / "benchmarks").mkdir()
    with pytest.raises(ValueError, match=r"pytest could not run the benchmarks \(exit code [245]\)"):
        ratios.measure(root=tmp_path)


# ---------------------------------------------------------------------------------------- the gate's report


def test_what_cannot_be_run_is_told_from_what_fails(
    stored: Path, scale: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: Run
) -> None:
    monkeypatch.setitem(recipes.SCALES, "tiny", scale)
    (stored / "tiny" / "tokens.json").unlink()
    arguments = ["--references", stored, "--out", tmp_path / "out"]
    code, out, _ = run_command("gate", "tokens", *arguments)
    assert code == 2
    assert f"tokens, all: not run: There are no stored tokens {stored}" in out
    (suite,) = ET.parse(tmp_path / "out" / "junit.xml").getroot()
    assert (suite.get("errors"), suite.get("failures")) == ("1", "0")
    (stored / "goldens" / "broken.npz").write_bytes(b"PK")
    assert run_command("gate", "goldens", "tokens", *arguments)[0] == 1
    assert "The gate has no part speed" in error_of(run_command("gate", "speed", *arguments))


def test_quick_says_what_it_skips(stored: Path, scale: Scale, tmp_path: Path) -> None:
    parts = gate.run_gate(scale, stored, tmp_path, parts=("tiny", "benchmarks"), quick=True)
    assert [part.verdict for part in parts] == ["pass", "skipped"]
    skipped = {check.name for check in parts[0].checks if check.verdict == "skipped"}
    assert {"table2a/autoregressive", "table3/real", "table5/cached", "right-class"} <= skipped
    assert not any(name.startswith("table1") for name in skipped)
    gate.write_junit(tmp_path / "junit.xml", parts)
    first, second = ET.parse(tmp_path / "junit.xml").getroot()
    assert first.get("skipped") == str(len(skipped)) == str(len(first.findall("testcase/skipped")))
    assert second.get("tests") == "1"


def test_exit_codes() -> None:
    good, failed, absent, skipped = (Part(v, (Check("c", v),)) for v in ("pass", "fail", "not run", "skipped"))
    assert gate.exit_code([good, skipped]) == 0
    assert gate.exit_code([good, absent]) == 2
    assert gate.exit_code([absent, failed, good]) == 1
    assert gate.run_part("empty", list).verdict == "not run"
    assert Part("two", (*failed.checks, *absent.checks)).verdict == "fail"


# ------------------------------------------------------------------------------------------------- references


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A git checkout."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "file").write_text("1")
    for arguments in (
        ["init", "--quiet"],
        ["config", "user.name", "Ada"],
        ["config", "user.email", "ada@example.org"],
        ["add", "."],
        ["commit", "--quiet", "--message", "first"],
    ):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != LOCK]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.fixture
def new_ratios(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios.write(stored / "benchmarks" / "ratios.json", some_ratios(head=5.0, old=2.0))
    monkeypatch.setattr(ratios, "measure", lambda: some_ratios(head=3.0, new=4.0))


@pytest.mark.usefixtures("new_ratios")
def test_update_shows_what_differs_and_writes_nothing(stored: Path, scale: Scale, source: Path, tmp_path: Path) -> None:
    before = contents(stored)
    changes = references.update(scale, stored, tmp_path / "out", parts=["benchmarks"], source=source)
    assert changes == [
        ("head", "5.00x", "3.00x", "changed"),
        ("old", "2.00x", "–", "changed"),
        ("new", "–", "4.00x", "changed"),
    ]
    assert contents(stored) == before


@pytest.mark.usefixtures("new_ratios")
def test_update_replaces_and_records(
    stored: Path, scale: Scale, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(stored / "tiny" / "results.json")
    old = before.rows[0].metrics["PSNR"]
    better = before.rows[0].model_copy(update={"metrics": {**before.rows[0].metrics, "PSNR": 30.0}})
    rows = [better, *before.rows[1:]]
    measured = before.model_copy(update={"rows": rows, "trends": trends(rows)})

    def changed(*arguments: Any, out: Path, **options: Any) -> tuple[Results, None]:
        shutil.copytree(stored / "tiny", out, ignore=shutil.ignore_patterns("weights"))
        results.write(out / "results.json", measured)
        edit(out / "tokens.json", lambda file: file["tokenbridge-64"].__setitem__(0, file["tokenbridge-64"][1]))
        return measured, None

    monkeypatch.setattr(references, "reproduce_scale", changed)
    files = contents(stored)
    references.update(scale, stored, tmp_path / "out", why="a better autoencoder", source=source)
    after = contents(stored)
    names = {"tiny/results.json", "tiny/tokens.json", "tiny/tables.md", "benchmarks/ratios.json", "CHANGES.md"}
    assert after["paper/expected.json"] == files["paper/expected.json"]  # the verdicts are the same
    assert {name for name in after if after[name] != files.get(name)} == names
    assert files.keys() <= after.keys()
    assert json.loads(after["tiny/results.json"])["rows"][0]["metrics"]["PSNR"] == 30.0
    record = after["CHANGES.md"].decode()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True).stdout.strip()
    assert f"Ada <ada@example.org>, measured at commit {commit}: a better autoencoder" in record
    assert re.search(r"^## 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$", record, re.MULTILINE)
    assert f"| table1a/vae PSNR | {old:.6g} | 30 | changed |" in record
    assert re.search(r"\| tokens tokenbridge-64 \|  \| 9\d\.\d% equal \| within tolerance \|", record)
    references.update(scale, stored, tmp_path / "out", parts=["benchmarks"], why="again", source=source)
    assert (stored / "CHANGES.md").read_text().startswith(record)


@pytest.mark.usefixtures("new_ratios")
def test_update_refuses(
    stored: Path, scale: Scale, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, where = contents(stored), (scale, stored, tmp_path / "out")

    def refused(match: str, why: str = "why", source: Path = source) -> None:
        with pytest.raises(ValueError, match=match):
            references.update(*where, parts=["benchmarks"], why=why, source=source)
        assert contents(stored) == before

    measure = ratios.measure

    def measured_while_edited() -> Ratios:
        (source / "file").write_text("2")
        return measure()

    monkeypatch.setattr(ratios, "measure", measured_while_edited)
    refused("uncommitted changes")  # found after the measurement
    monkeypatch.setattr(ratios, "measure", lambda: pytest.fail("measured in vain"))
    refused(r"uncommitted changes \(file")
    refused("say it with --why", why=" ")
    refused("not a git checkout", source=tmp_path)
    subprocess.run(["git", "commit", "--all", "--quiet", "--message", "second"], cwd=source, check=True)
    (source / "untracked").touch()
    refused(r"uncommitted changes \(untracked")
    (source / "untracked").unlink()
    monkeypatch.setattr(ratios, "measure", lambda: some_ratios(failed=("test_head",)))
    refused("These benchmarks fail, .* test_head")
    with pytest.raises(ValueError, match="no references speed"):
        references.update(*where, parts=["speed"])


def test_update_by_the_command(
    stored: Path, scale: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_command: Run
) -> None:
    monkeypatch.setitem(recipes.SCALES, "tiny", scale)
    monkeypatch.setattr(ratios, "measure", lambda: some_ratios(head=3.0))
    arguments = ["update-references", "benchmarks", "--references", stored, "--out", tmp_path / "out"]
    code, out, _ = run_command(*arguments)
    assert code == 0
    assert re.search(r"head .* – .* 3\.00x .* changed", out)
    assert out.endswith("Nothing was written.\n")
    assert "say it with --why" in error_of(run_command(*arguments, "--write"))


@pytest.mark.usefixtures("new_ratios")
@pytest.mark.parametrize("step", ["shutil.copytree", "shutil.copyfile", "references.write_text"])
def test_a_kill_leaves_the_old_references(
    stored: Path, scale: Scale, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = contents(stored)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(
            f"tokenbridge.regression.references.{step.removeprefix('references.')}",
            lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL),
        )
        try:
            references.update(scale, stored, tmp_path / "out", parts=["benchmarks"], why="why", source=source)
        finally:
            os._exit(0)  # not reached
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert contents(stored) == before
    references.update(scale, stored, tmp_path / "out", parts=["benchmarks"], why="why", source=source)
    assert contents(stored) != before


@pytest.mark.usefixtures("new_ratios")
def test_two_updates_at_once_lose_none(stored: Path, scale: Scale, source: Path, tmp_path: Path) -> None:
    """The second one is refused before it measures, because it would compare with references about to be replaced."""
    where = (scale, stored, tmp_path / "out")
    with locked(stored):
        with pytest.raises(FolderInUseError, match=f"in use by another run, process {os.getpid()} on "):
            references.update(*where, parts=["benchmarks"], why="why", source=source)
        references.update(*where, parts=["benchmarks"], source=source)  # only looks
    (source / ".tokenbridge-leftover").mkdir()
    (source / ".tokenbridge-leftover" / "file").touch()  # is no change of the checkout
    references.update(*where, parts=["benchmarks"], why="why", source=source)
    assert not list(stored.glob(".tokenbridge*"))


# ------------------------------------------------------------------------------------------------- in GitHub CI


def test_the_workflow_runs_what_there_is() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "gate.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    steps = workflow["jobs"]["gate"]["steps"]
    # A tag can be moved, a commit cannot.
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step)
    (first, second) = [step["run"] for step in steps if "run" in step]
    assert os.access(ROOT / first, os.X_OK)
    launcher, flag, session, *options = second.split()
    assert (flag, session, options) == ("-s", "gate", ["--", "--quick"])
    assert launcher.removesuffix("/bin/nox") in (ROOT / first).read_text()  # made by the first
    assert "def gate(session: nox.Session)" in (ROOT / "noxfile.py").read_text()
    (upload,) = [step["with"]["path"].split() for step in steps if "upload" in step.get("uses", "")]
    assert upload == ["runs/gate/junit.xml", "runs/gate/audit/"]
