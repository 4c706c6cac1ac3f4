"""Scores, and the names by which result files hold them.

A result file has metrics by name (`FID-digits`, `FID-50K`, `FID (50 images)`). A name says which metric it is, which
extractor computed the features, and how many images were scored. This module alone makes and reads such names:

    METRIC[-PART][-50K][-EXTRACTOR][ (N images)][ (REMARK)]

`FID-digits` uses the features of the classifier of digits, `FID-other-inception (50 images)` those of an Inception
whose weights are not the published ones. A name without an extractor stands for the published Inception, or for a
metric that needs no features. `FID-50K` is the FID of 50,000 images by the published Inception, which papers print.
`IS-std` is a part of `IS`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

NUM_IMAGES = 50_000  # images behind the paper's scores
OTHER_INCEPTION = "other-inception"  # the extractor of scores by Inception weights that are not the published ones

Part = Literal["std", "low", "high", "bias"]
PARTS: tuple[Part, ...] = get_args(Part)

DEVIATION, CHANGE = "± ", "change of "  # prefixes: deviation over seeds, and change against another arm

_HYPHENATED = ("FID-cleanfid-legacy", "FID-cleanfid-clean", "FID-cleanfid", "speed-up")  # metrics; longer ones first
_NAME = re.compile(
    rf"(?P<metric>(?:{DEVIATION})?(?:{CHANGE})?(?:{'|'.join(_HYPHENATED)}|[^-(]*[^-( ]))"
    rf"(?:-(?P<part>{'|'.join(PARTS)}))?"
    r"(?:-(?:(?P<paper>50K)|(?P<count>\d+)))?"  # table 1 once wrote `rFID-3` for `rFID (3 images)`
    r"(?:-(?P<extractor>[^(]*[^( ]))?"
    r"(?(paper)|(?(count)|(?: \((?P<images>\d[\d,]*) images\))?))"
    r"(?: \((?P<remark>.+)\))?"
)


@dataclass(frozen=True)
class ScoreName:
    """The parts of a name; `str` returns the name."""

    metric: str  # "FID", "class accuracy", "change of FID", "± FID" (the deviation over seeds)
    part: Part | None = None
    extractor: str | None = None  # None stands for the published Inception, or for no features
    num_images: int | None = None  # None if the name does not say it
    remark: str | None = None

    def __str__(self) -> str:
        """Return the name, in which a part of a score omits `-50K`."""
        papers = self.num_images == NUM_IMAGES
        return "".join(
            (
                self.metric,
                "" if self.part is None else f"-{self.part}",
                "-50K" if papers and self.part is None else "",
                "" if self.extractor is None else f"-{self.extractor}",
                "" if self.num_images is None or papers else f" ({self.num_images:,} images)",
                "" if self.remark is None else f" ({self.remark})",
            )
        )


def read_name(name: str) -> ScoreName:
    """Return the parts of a name. A text that is not of this form counts as the name of a metric."""
    match = _NAME.fullmatch(name)
    if match is None:
        return ScoreName(name)
    count = match["count"] or (match["images"] or "").replace(",", "")
    num_images = NUM_IMAGES if match["paper"] else int(count) if count else None
    part: Part | None = match["part"]  # type: ignore[assignment]  # the pattern matches no other parts
    return ScoreName(match["metric"], part, match["extractor"], num_images, match["remark"])


@dataclass(frozen=True)
class Score:
    """A measured value with its metric, extractor and number of images, and with its spread and interval.

    `metric`, `extractor`, `num_images` and `remark` are as in `ScoreName`.
    """

    metric: str
    value: float
    extractor: str | None = None
    num_images: int | None = None
    remark: str | None = None
    std: float | None = None  # over the splits of the Inception Score, or the subsets of KID
    low: float | None = None  # ends of the bootstrap's 95 % interval
    high: float | None = None
    bias: float | None = None  # bias of the estimator, by the bootstrap

    def __post_init__(self) -> None:
        """Refuse a name that would be read back as another one."""
        read = read_name(self.name)
        if read.part is not None:  # a part without its value
            read = replace(read, metric=f"{read.metric}-{read.part}", part=None)
        assert read == self.label, f"{self.name} is read as {read}"

    @property
    def label(self) -> ScoreName:
        """The parts of the name."""
        return ScoreName(self.metric, None, self.extractor, self.num_images, self.remark)

    @property
    def name(self) -> str:
        """The name in result files."""
        return str(self.label)

    @property
    def bare(self) -> Score:
        """The same score without spread, interval and bias."""
        return replace(self, std=None, low=None, high=None, bias=None)


def to_metrics(scores: Iterable[Score]) -> dict[str, float]:
    """Return scores as the metrics of a row of a result file: values with their spreads, then intervals."""
    scores = list(scores)
    named: list[tuple[Score, Part | None]] = []
    for parts in ((None, "std"), ("low", "high", "bias")):
        named += [(score, part) for score in scores for part in parts]
    metrics: dict[str, float] = {}
    for score, part in named:
        value = score.value if part is None else getattr(score, part)
        if value is not None:
            name = str(replace(score.label, part=part))
            assert name not in metrics, f"{name} is given twice"
            metrics[name] = value
    return metrics


def to_scores(metrics: Mapping[str, float]) -> list[Score]:
    """Return the scores in a row of a result file; a part whose value is missing becomes a score of its own."""
    labels = {name: read_name(name) for name in metrics}
    found = {
        label: Score(label.metric, metrics[name], label.extractor, label.num_images, label.remark)
        for name, label in labels.items()
        if label.part is None
    }
    for name, label in labels.items():
        if label.part is None:
            continue
        whole = replace(label, part=None)
        papers = replace(whole, num_images=whole.num_images or NUM_IMAGES)
        owner = whole if whole in found else papers
        if owner in found:
            part: dict[str, Any] = {label.part: metrics[name]}
            found[owner] = replace(found[owner], **part)
        else:
            alone = f"{label.metric}-{label.part}"
            found[label] = Score(alone, metrics[name], label.extractor, label.num_images, label.remark)
    return list(found.values())


def deviation_of(name: str) -> str:
    """Return the name of a score's standard deviation over seeds."""
    label = read_name(name)
    return str(replace(label, metric=f"{DEVIATION}{label.metric}"))


def change_of(name: str) -> str:
    """Return the name of the change of a score against another arm of a comparison."""
    label = read_name(name)
    return str(replace(label, metric=f"{CHANGE}{label.metric}"))


def score_of(metrics: Mapping[str, float], metric: str) -> Score:
    """Return the one score of a metric in a row, whoever's features and however many images it is of.

    Raises:
        KeyError: the row has none, or several.
    """
    found = [score for score in to_scores(metrics) if score.metric == metric]
    if len(found) != 1:
        raise KeyError(metric)
    return found[0]
