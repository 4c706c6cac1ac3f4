"""Result files, verdicts and tables."""

from __future__ import annotations

import json
import math
import os
import re
from typing import TYPE_CHECKING, Any

import pytest
from builders import make_results
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tokenbridge.results.compare import compare, incomparable, verdicts
from tokenbridge.results.markdown import columns_of, markdown_table, tables, to_markdown
from tokenbridge.results.schema import SCHEMA, STAND_IN, Results, Row, Trend, digest_of, read, write
from tokenbridge.results.tolerances import METRICS, Tolerance, metric
from tokenbridge.results.verdicts import judge, within

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ROWS = [
    Row(id="table1a/vae", label="VAE, continuous", metrics={"PSNR": 25.0, "SSIM": 0.9}),
    Row(id="table1a/ptq-64", label="64 levels", metrics={"PSNR": 24.9, "bits per image": 1536.0}),
    Row(id="table3/real", label="real", metrics={"FID-digits": 1.5, "class accuracy": 0.99}),
    Row(id="table3/parallel", label="parallel head", metrics={}, not_run="no weights"),
]
TRENDS = [Trend(id="a", claim="levels keep PSNR", measured=0.99, bound=0.95, relation=">=")]
RESULTS = make_results(
    ROWS,
    TRENDS,
    scale="tiny",
    wall_seconds=12.3,
    commit="0123abc",
    dirty=True,
    versions={"python": "3.11"},
    hardware={"cores": 2},
    data_sha256={"digits/train": "00"},
    weights_sha256={"vae": "11"},
    settings={"num_images": 20},
)

any_row = st.builds(
    Row,
    id=st.just("table3/x"),
    label=st.just("x"),
    metrics=st.dictionaries(
        st.sampled_from([name for name in METRICS if name != "seconds per image"]),
        st.floats(0.001, 1e6, allow_nan=False),
    ),
)


def row(**metrics: float) -> Row:
    return Row(id="table3/x", label="x", metrics={key.replace("_", "-"): value for key, value in metrics.items()})


# ---------------------------------------------------------------- verdicts


@given(any_row)
def test_a_row_reproduces_itself(some: Row) -> None:
    assert compare(some, some) == ("reproduced", "all metrics within tolerance")


@given(st.sampled_from(sorted(METRICS)), st.floats(0.01, 1e4), st.booleans())
def test_tolerance_is_where_the_table_says(name: str, reference: float, above: bool) -> None:
    """A hair inside is within, a hair outside is not (hair: 1e-6 of the tolerance, float rounding is 1e-16)."""
    m = METRICS[name]
    if math.isinf(m.relative):
        assert within(name, reference * 1e6, reference)
        assert not within(name, 0.0, reference)
        return
    tolerance = m.absolute + m.relative * reference
    sign = 1 if above else -1
    hair = 1e-6 * tolerance + 1e-9 * reference
    assert within(name, reference + sign * (tolerance - hair if tolerance else 0), reference)
    assert not within(name, reference + sign * (tolerance + hair), reference)


def test_outside_of_tolerance_is_not_reproduced() -> None:
    verdict, why = compare(row(PSNR=25.2, SSIM=0.9), row(PSNR=25.0, SSIM=0.9))
    assert verdict == "not reproduced"
    assert why == "PSNR 25.2 against 25"
    _, why = compare(row(PSNR=25.2, SSIM=0.5), row(PSNR=25.0, SSIM=0.9))
    assert why == "PSNR 25.2 against 25; SSIM 0.5 against 0.9"


def test_difference_that_is_reported_can_be_seen() -> None:
    """Counts are exact, so the two numbers in the reason must not print alike."""
    verdict, why = compare(row(parameters=1234567.0), row(parameters=1234568.0))
    assert verdict == "not reproduced"
    first, second = why.removeprefix("parameters ").split(" against ")
    assert first != second


def test_missing_and_extra_metrics_are_not_reproduced() -> None:
    for ours, reference in ((row(PSNR=25.0), row(PSNR=25.0, SSIM=0.9)), (row(PSNR=25.0, SSIM=0.9), row(PSNR=25.0))):
        assert compare(ours, reference) == ("not reproduced", "only one of the two has SSIM")


def test_row_without_reference_is_not_reproduced() -> None:
    not_run = Row(id="table3/x", label="x", metrics={}, not_run="no weights")
    for reference in (None, not_run):
        assert compare(row(PSNR=25.0), reference) == ("not reproduced", "the reference has no such row")


def test_row_that_was_not_run_says_why() -> None:
    not_run = Row(id="table3/x", label="x", metrics={}, not_run="no weights")
    for reference in (None, not_run, row(PSNR=25.0)):
        assert compare(not_run, reference) == ("not run", "no weights")


def test_verdicts_go_by_id() -> None:
    reversed_reference = RESULTS.model_copy(update={"rows": ROWS[::-1]})
    assert [v for v, _ in verdicts(RESULTS, reversed_reference).values()] == ["reproduced"] * 3 + ["not run"]
    assert [v for v, _ in verdicts(RESULTS, None).values()] == ["not compared"] * 3 + ["not run"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"settings": {"num_images": 60}}, "it is of 60 images, and the stored result of 20"),
        ({"seed": 7}, "it is of seed 7, and the stored result of seed 0"),
    ],
)
def test_other_samples_are_not_compared(changes: dict[str, Any], reason: str) -> None:
    """Reconstructions are, because they depend on neither."""
    other = RESULTS.model_copy(update={"provenance": RESULTS.provenance.model_copy(update=changes)})
    judged = verdicts(other, RESULTS)
    assert judged["table3/real"] == ("not compared", reason)
    assert judged["table1a/vae"][0] == "reproduced"
    assert judged["table3/parallel"][0] == "not run"


def test_row_that_only_the_reference_has_is_noticed() -> None:
    """A table that lost a row is not a table that was reproduced."""
    shorter = RESULTS.model_copy(update={"rows": ROWS[1:]})
    judged = verdicts(shorter, RESULTS)
    assert judged["table1a/vae"][0] in ("not reproduced", "not run")


@pytest.mark.parametrize(
    ("relation", "measured", "holds"),
    [
        (">=", 1.0, True),
        (">=", 1.1, True),
        (">=", 0.9, False),
        ("<=", 1.0, True),
        ("<=", 0.9, True),
        ("<=", 1.1, False),
    ],
)
def test_trend_holds(relation: Any, measured: float, holds: bool) -> None:
    assert Trend(id="a", claim="a", measured=measured, bound=1.0, relation=relation).holds == holds


# ---------------------------------------------------------------- metrics


def test_metric_finds_labelled_names() -> None:
    for name in METRICS:
        assert metric(name) is METRICS[name]
        assert metric(f"{name}-digits") is METRICS[name]
    assert metric("FID-cleanfid-digits") is METRICS["FID-cleanfid"]
    assert metric("FID-low-other-inception (1,000 images)") is METRICS["FID-low"]
    assert metric("FID-low").low < 0 == metric("FID-digits").low == metric("IS-std-digits").low


@pytest.mark.parametrize("name", ["XYZ", "XYZ-digits", "", "fid", "XYZ (5 images)", "-FID"])
def test_unknown_metric(name: str) -> None:
    with pytest.raises(KeyError):
        metric(name)


def test_every_tolerance_has_a_reason() -> None:
    assert all(len(m.reason) > 5 and m.relative >= 0 and m.absolute >= 0 for m in METRICS.values())


# ---------------------------------------------------------------- files


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    write(path, RESULTS)
    return path


def test_read_gives_back_what_was_written(stored: Path) -> None:
    assert read(stored) == RESULTS
    assert json.loads(stored.read_text())["schema_version"] == SCHEMA


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))  # NaN becomes the NaN that Python's reader takes

    return apply


def signed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Edit, then compute the digest anew: what a forger does, and a program of other people's."""

    def sign(value: dict[str, Any]) -> None:
        change(value)
        value["sha256"] = digest_of(value)

    return edit(sign)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def into_link(target: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return apply


def replaced(old: str, new: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return apply


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cut off"),
    "empty": (lambda path: path.write_bytes(b""), "cut off"),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cut off"),
    "endless brackets": (lambda path: path.write_text("[" * 100_000), "cut off"),
    "folder": (into_folder, "is a folder"),
    "list": (lambda path: path.write_text("[]"), "file: all of it: "),
    "missing file": (lambda path: path.unlink(), "no result file"),
    "NaN": (edit(lambda v: v["rows"][0]["metrics"].update(PSNR=math.nan)), "rows.0.metrics.PSNR"),
    "infinity": (edit(lambda v: v["rows"][0]["metrics"].update(PSNR=math.inf)), "rows.0.metrics.PSNR"),
    "extra field": (edit(lambda v: v.update(comment="hi")), "comment"),
    "extra field of a row": (edit(lambda v: v["rows"][1].update(comment="hi")), "rows.1.comment"),
    "missing field": (edit(lambda v: v.pop("trends")), "trends"),
    "other schema": (edit(lambda v: v.update(schema_version="tokenbridge-results/2")), "schema_version"),
    "text for a number": (edit(lambda v: v["rows"][0]["metrics"].update(PSNR="high")), "rows.0.metrics.PSNR"),
    "metric changed": (edit(lambda v: v["rows"][0]["metrics"].update(PSNR=25.1)), "changed after it was written"),
    "metric's last bit": (
        edit(lambda v: v["rows"][0]["metrics"].update(PSNR=math.nextafter(v["rows"][0]["metrics"]["PSNR"], 99))),
        "changed after it was written",
    ),
    "row gone": (edit(lambda v: v["rows"].pop()), "changed after it was written"),
    "hash of weights": (edit(lambda v: v["provenance"].update(weights_sha256={})), "changed after it was written"),
    "other digest": (edit(lambda v: v.update(sha256="0" * 64)), "changed after it was written"),
    "no digest": (edit(lambda v: v.pop("sha256")), "no digest"),
    "NaN in the settings": (edit(lambda v: v["provenance"]["settings"].update(x=math.nan)), "NaN or infinite"),
    "unknown metric": (signed(lambda v: v["rows"][0]["metrics"].update(beauty=1.0)), "unknown metric 'beauty'"),
    "negative PSNR": (signed(lambda v: v["rows"][0]["metrics"].update(PSNR=-3.0)), "PSNR -3, which no measurement"),
    "precision above 1": (
        signed(lambda v: v["rows"][0]["metrics"].update(precision=1.01)),
        "precision 1.01, which no measurement",
    ),
    "IS below 1": (signed(lambda v: v["rows"][0]["metrics"].update(IS=0.5)), "IS 0.5, which no measurement"),
    "row twice": (signed(lambda v: v["rows"].append(v["rows"][0])), "rows twice: table1a/vae"),
    "IS above the number of classes": (
        signed(lambda v: v["rows"][0]["metrics"].update(IS=1009.0)),
        "IS 1009, which no measurement",
    ),
    "name without end": (signed(lambda v: v["rows"][0]["metrics"].update({"a" * 10**6: 1.0})), "unknown metric 'aaaa"),
    "number as text": (signed(lambda v: v["rows"][0]["metrics"].update(PSNR="25.0")), "rows.0.metrics.PSNR"),
    "number as truth": (signed(lambda v: v["rows"][0]["metrics"].update(SSIM=True)), "rows.0.metrics.SSIM"),
    "NaN as text": (signed(lambda v: v["rows"][0]["metrics"].update(PSNR="nan")), "rows.0.metrics.PSNR"),
    "number as null": (signed(lambda v: v["rows"][0]["metrics"].update(PSNR=None)), "rows.0.metrics.PSNR"),
    "infinity by overflow": (replaced('"PSNR": 25.0', '"PSNR": 1e999'), "rows.0.metrics.PSNR"),
    "seed as text": (signed(lambda v: v["provenance"].update(seed="0")), "provenance.seed"),
    "seed as a fraction": (signed(lambda v: v["provenance"].update(seed=0.5)), "provenance.seed"),
    "negative seed": (signed(lambda v: v["provenance"].update(seed=-1)), "seed is -1"),
    "endless integer": (replaced('"seed": 0', '"seed": 1' + "0" * 5000), "whole number of 5001 digits"),
    "large integer": (replaced('"seed": 0', f'"seed": {2**63}'), "whole number of 19 digits"),
    "negative time": (signed(lambda v: v["provenance"].update(wall_seconds=-5.0)), "it took -5 seconds"),
    "time in words": (signed(lambda v: v["provenance"].update(started="tomorrow")), "started at 'tomorrow'"),
    "time without zone": (signed(lambda v: v["provenance"].update(started="2026-01-01")), "no time with a time zone"),
    "dirty in words": (signed(lambda v: v["provenance"].update(dirty="no")), "provenance.dirty"),
    "byte order mark": (lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()), "cut off"),
    "UTF-16": (lambda path: path.write_bytes(path.read_text().encode("utf-16")), "cut off"),
    "key twice": (replaced('"seed": 0', '"seed": 0, "seed": 0'), "has the key 'seed' twice"),
    "key twice, elsewhere": (replaced('"PSNR": 25.0', '"PSNR": 1.0, "PSNR": 25.0'), "has the key 'PSNR' twice"),
    "deep nesting": (
        signed(lambda v: v["provenance"]["settings"].update(x=json.loads("[" * 200 + "]" * 200))),
        "nested more than 50 levels",
    ),
    "half a character": (signed(lambda v: v["rows"][0].update(label="\ud800")), "cannot be read as a result file"),
    "half a character in a key": (
        signed(lambda v: v["provenance"]["settings"].update({"\ud800": 1})),
        "cannot be read",
    ),
    "pipe": (into_pipe, "no regular file"),
    "device": (into_link("/dev/zero"), "no regular file"),
    "sparse file": (lambda path: os.truncate(path, 2**33), "longer than"),
    "other relation": (edit(lambda v: v["trends"][0].update(relation="=")), "trends.0.relation"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_one_error_that_names_it(stored: Path, case: str) -> None:
    damage, where = BROKEN[case]
    damage(stored)
    with pytest.raises(ValueError, match=re.escape(where)) as caught:
        read(stored)
    assert not isinstance(caught.value, ValidationError)  # pydantic's is a page long
    assert str(stored) in str(caught.value)


def test_the_digest_is_of_the_contents_not_of_their_layout(stored: Path) -> None:
    value = json.loads(stored.read_text())
    assert value["sha256"] == digest_of(value) == digest_of(RESULTS.model_dump())
    stored.write_text(json.dumps(dict(reversed(value.items())), indent=7))
    assert read(stored) == RESULTS


def test_nothing_is_written_that_cannot_be_read(tmp_path: Path) -> None:
    bad = ROWS[0].model_copy(update={"metrics": {"PSNR": math.nan}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path / "results.json", RESULTS.model_copy(update={"rows": [bad]}))
    assert list(tmp_path.iterdir()) == []


def test_what_compares_with_the_paper() -> None:
    def run(scale: str, **settings: Any) -> Results:
        p = RESULTS.provenance.model_copy(update={"settings": settings})
        return RESULTS.model_copy(update={"scale": scale, "provenance": p})

    full = {"num_images": 50_000, "published Inception weights": True}
    assert incomparable(run("paper", **full)) is None
    assert "50,000" in str(incomparable(run("paper", **{**full, "num_images": 49_999})))
    assert "Inception" in str(incomparable(run("paper", **{**full, "published Inception weights": False})))
    assert "Inception" in str(incomparable(run("paper", num_images=50_000)))
    assert "tiny" in str(incomparable(run("tiny", **full)))
    assert "stand-in" in str(incomparable(run(STAND_IN, **full)))


def test_folder_for_a_file(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path))):
        read(tmp_path)


# ---------------------------------------------------------------- tables


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_markdown_table_shape() -> None:
    lines = markdown_table(["", "PSNR", "verdict"], [["VAE", "25.00", "reproduced"], ["VQ", "–", "not run"]])
    assert lines[1] == "| --- | ---: | ---: |"
    assert [cells(line) for line in lines[2:]] == [["VAE", "25.00", "reproduced"], ["VQ", "–", "not run"]]
    assert {line.count("|") for line in lines} == {4}


def test_tables_and_columns_keep_their_order() -> None:
    assert list(tables(RESULTS)) == ["table1a", "table3"]
    assert columns_of(ROWS[:2]) == ["PSNR", "SSIM", "bits per image"]


def test_page_has_rows_verdicts_trends_tolerances() -> None:
    off = ROWS[0].model_copy(update={"metrics": {"PSNR": 20.0, "SSIM": 0.9}})
    page = to_markdown(RESULTS, RESULTS.model_copy(update={"rows": [off, *ROWS[1:]]}))
    lines = page.splitlines()
    by_first = {cells(line)[0]: cells(line) for line in lines if line.startswith("|")}
    assert by_first["VAE, continuous"] == ["VAE, continuous", "25.00", "0.9000", "–", "not reproduced"]
    assert by_first["64 levels"] == ["64 levels", "24.90", "–", "1,536", "reproduced"]
    assert by_first["parallel head"] == ["parallel head", "–", "–", "not run"]
    assert by_first["levels keep PSNR"] == ["levels keep PSNR", "0.99", ">= 0.95", "holds"]
    assert by_first["FID-digits"][1] == "5% + 0.002"
    assert by_first["bits per image"][1] == "exact"
    assert "- VAE, continuous: not reproduced: PSNR 25 against 20" in lines
    assert "- parallel head: not run: no weights" in lines
    assert not any(line.startswith("- 64 levels") for line in lines)
    for text in ("tokenbridge reproduce tiny", "seed 0", "0123abc", "uncommitted changes"):
        assert text in page
    for title in ("## Table 1a.", "## Table 3.", "## The paper's argument", "## Tolerances"):
        assert title in page


def test_page_without_reference_or_commit() -> None:
    unknown = RESULTS.provenance.model_copy(update={"commit": None, "dirty": None})
    page = to_markdown(RESULTS.model_copy(update={"provenance": unknown, "trends": []}), None)
    assert "commit unknown." in page
    assert "argument" not in page


def test_a_number_that_is_not_finite_is_not_reproduced() -> None:
    tolerance = Tolerance(absolute=10.0, reason="tests")
    for measured in (math.nan, math.inf):
        assert judge(1.0, measured, tolerance) == "not reproduced"
    assert judge(1.0, 2.0, tolerance) == "reproduced"  # the control
