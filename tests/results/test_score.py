"""Scores and their names in result files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tokenbridge.results.score import (
    NUM_IMAGES,
    OTHER_INCEPTION,
    PARTS,
    Score,
    ScoreName,
    read_name,
    score_of,
    to_metrics,
    to_scores,
)
from tokenbridge.results.tolerances import METRICS, metric

FOLDER = Path(__file__).parents[2] / "reference_results"
STORED = [
    (f"{path.parent.name}/{row['id']}", row["metrics"])
    for path in sorted(FOLDER.glob("*/results.json"))
    for row in json.loads(path.read_text())["rows"]
]

# What each name means, by hand: this project's own result files and commands hold, or have held, all of these.
NAMES = {
    "FID-digits": ScoreName("FID", extractor="digits"),
    "FID-50K": ScoreName("FID", num_images=50_000),
    "FID": ScoreName("FID"),
    "FID (50 images)": ScoreName("FID", num_images=50),
    "FID (1,000 images)": ScoreName("FID", num_images=1000),
    "FID-other-inception": ScoreName("FID", extractor="other-inception"),
    "FID-other-inception (50 images)": ScoreName("FID", extractor="other-inception", num_images=50),
    "FID-50K-other-inception": ScoreName("FID", extractor="other-inception", num_images=50_000),
    "rFID (3 images)": ScoreName("rFID", num_images=3),
    "FID-cleanfid": ScoreName("FID-cleanfid"),
    "FID-cleanfid-digits": ScoreName("FID-cleanfid", extractor="digits"),
    "FID-cleanfid-legacy": ScoreName("FID-cleanfid-legacy"),
    "FID-cleanfid-clean-other-inception (2 images)": ScoreName(
        "FID-cleanfid-clean", extractor="other-inception", num_images=2
    ),
    "IS-std-digits": ScoreName("IS", "std", "digits"),
    "KID-std": ScoreName("KID", "std"),
    "FID-low": ScoreName("FID", "low"),
    "FID-high-other-inception (50 images)": ScoreName("FID", "high", "other-inception", 50),
    "FID-bias (50 images)": ScoreName("FID", "bias", num_images=50),
    "± FID-digits": ScoreName("± FID", extractor="digits"),
    "change of FID-digits": ScoreName("change of FID", extractor="digits"),
    "± change of FID-digits": ScoreName("± change of FID", extractor="digits"),
    "± ms": ScoreName("± ms"),
    "class accuracy": ScoreName("class accuracy"),
    "speed-up": ScoreName("speed-up"),
    "speed-up (one position)": ScoreName("speed-up", remark="one position"),
    "relative MSE (N(0, 1))": ScoreName("relative MSE", remark="N(0, 1)"),
    "tokens that differ (latents, mapped)": ScoreName("tokens that differ", remark="latents, mapped"),
}

bare_metrics = st.sampled_from(sorted({read_name(name).metric for name in METRICS}))
extractors = st.sampled_from(["digits", "objects", OTHER_INCEPTION, "dino-v2", "50Kx", "lowest"])
counts = st.sampled_from([2, 3, 50, 999, 1000, 2047, 10_000, NUM_IMAGES])
remarks = st.sampled_from(["one position", "N(0, 1)", "latents, mapped"])
values = st.floats(-1e9, 1e9)
scores = st.builds(
    Score,
    bare_metrics,
    values,
    st.none() | extractors,
    st.none() | counts,
    st.none() | remarks,
    **{part: st.none() | values for part in PARTS},
)


@pytest.mark.parametrize("name", NAMES)
def test_names_mean_what_they_say(name: str) -> None:
    assert read_name(name) == NAMES[name]
    assert str(NAMES[name]) == name


def test_a_count_of_before_is_read_and_written_as_today() -> None:
    assert read_name("rFID-3") == ScoreName("rFID", num_images=3)
    assert str(read_name("rFID-3")) == "rFID (3 images)"


@pytest.mark.parametrize("name", [n for n in METRICS if not n.endswith("-50K")])
@pytest.mark.parametrize("extractor", [None, "digits", OTHER_INCEPTION])
@pytest.mark.parametrize("num_images", [None, 50, NUM_IMAGES])
def test_every_metric_has_its_tolerance_under_every_label(name: str, extractor: str, num_images: int) -> None:
    label = replace(read_name(name), extractor=extractor, num_images=num_images)
    assert read_name(str(label)) == (replace(label, num_images=None) if label.part and num_images == 50_000 else label)
    papers = f"{name}-50K" if num_images == NUM_IMAGES and label.part is None else name
    assert metric(str(label)) is METRICS.get(papers, METRICS[name])


@given(st.lists(scores, max_size=6, unique_by=lambda s: s.name))
def test_scores_come_back_from_a_row(some: list[Score]) -> None:
    # `FID` and `FID-50K` in one row would share the name `FID-low`: no command measures both.
    names = {(s.metric, s.extractor, s.remark, s.num_images) for s in some}
    assume(not any((*key[:3], None) in names for key in names if key[3] == NUM_IMAGES))
    assert to_scores(to_metrics(some)) == some


@given(st.text("FIDrS50K- ()±,3dg", max_size=20))
def test_any_text_is_read(text: str) -> None:
    """A file may hold any name: what the codec makes of it has the same meaning for good."""
    once = read_name(text)
    assert read_name(str(once)).metric == once.metric


@pytest.mark.parametrize(("row", "metrics"), STORED, ids=[row for row, _ in STORED])
def test_stored_rows_come_back(row: str, metrics: dict[str, float]) -> None:
    assert [str(read_name(name)) for name in metrics] == list(metrics)
    assert to_metrics(to_scores(metrics)) == metrics


def test_there_are_stored_rows() -> None:
    assert len({name for _, metrics in STORED for name in metrics}) > 40


def test_parts_belong_to_their_score() -> None:
    metrics = {"images": 50_000.0, "FID-50K": 2.0, "IS-50K": 300.0, "IS-std": 4.0, "FID-low": 1.9, "FID-high": 2.1}
    assert to_scores({**metrics, "FID-bias": 0.5}) == [
        Score("images", 50_000.0),
        Score("FID", 2.0, num_images=50_000, low=1.9, high=2.1, bias=0.5),
        Score("IS", 300.0, num_images=50_000, std=4.0),
    ]
    assert to_scores({"FID-low-digits": 1.0, "FID-digits": 2.0}) == [Score("FID", 2.0, "digits", low=1.0)]


def test_a_part_of_another_score_is_left_alone() -> None:
    """A row that was cut keeps what it has; an interval by other features is not FID's."""
    metrics = {"FID": 2.0, "FID-low-digits": 1.0, "FID-high (50 images)": 3.0}
    assert to_scores(metrics)[0] == Score("FID", 2.0)
    assert to_metrics(to_scores(metrics)) == metrics


def test_values_come_before_intervals() -> None:
    fid = Score("FID", 2.0, low=1.0, high=3.0, bias=0.5)
    inception_score = Score("IS", 5.0, std=0.1)
    assert list(to_metrics([fid, inception_score])) == ["FID", "IS", "IS-std", "FID-low", "FID-high", "FID-bias"]
    assert list(to_metrics([fid.bare, inception_score.bare])) == ["FID", "IS"]


def test_one_score_of_a_row_is_found_in_any_order() -> None:
    """The first name that begins with `FID-` need not be FID's."""
    row = {"FID-cleanfid-digits": 1.0, "FID-low-digits": 0.5, "rFID-digits": 9.0, "FID-digits": 2.0}
    assert score_of(row, "FID") == Score("FID", 2.0, "digits", low=0.5)
    assert score_of(dict(reversed(row.items())), "FID").value == 2.0
    assert score_of(row, "FID-cleanfid").value == 1.0


@pytest.mark.parametrize("row", [{}, {"FID-cleanfid-digits": 1.0}, {"FID-digits": 1.0, "FID (50 images)": 2.0}])
def test_a_row_without_the_score_or_with_two(row: dict[str, float]) -> None:
    with pytest.raises(KeyError, match="FID"):
        score_of(row, "FID")


@pytest.mark.parametrize("extractor", ["", " ", "50K", "3", "low", "std-x", "a (b", "3-d"])
def test_labels_that_would_be_read_otherwise_are_refused(extractor: str) -> None:
    with pytest.raises(AssertionError):
        Score("FID", 1.0, extractor)


def test_two_scores_of_one_name_are_refused() -> None:
    with pytest.raises(AssertionError, match="FID-digits is given twice"):
        to_metrics([Score("FID", 1.0, "digits"), Score("FID", 2.0, "digits")])
