"""How each metric is printed, and how near two values of it must be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tokenbridge.results.score import read_name
from tokenbridge.utils.strict import Strict


class Tolerance(Strict):
    """The difference that is allowed between a value and its expected value, and the reason for its size."""

    relative: float = 0.0  # share of the expected value
    absolute: float = 0.0
    reason: str

    def of(self, value: float) -> float:
        """Return the allowed difference from an expected value."""
        return self.absolute + self.relative * abs(value)


@dataclass(frozen=True)
class Metric:
    """How a metric is printed and compared."""

    decimals: int
    relative: float  # tolerance as a share of the reference value
    absolute: float  # tolerance that is added to it, in units of the metric
    reason: str  # why the tolerance has this size
    # The range of possible values. Files may go below it by `absolute`, because FID of equal sets rounds to below 0.
    low: float = 0.0
    high: float = math.inf

    @property
    def is_compared(self) -> bool:
        """Whether two values of the metric are compared; times are not."""
        return math.isfinite(self.relative)

    @property
    def tolerance(self) -> Tolerance:
        """The allowed difference between two values, for metrics that are compared."""
        return Tolerance(relative=self.relative, absolute=self.absolute, reason=self.reason)


_SAME_NUMBERS = "deterministic; the rest is float rounding across processors"
_SAMPLING = (
    "rounding on another processor can flip single tokens, which re-draws part of the images; "
    "three standard deviations over four seeds or more (measured at tiny scale, 2,000 images)"
)
_PUBLISHED_RECONSTRUCTION = (
    "set beforehand, not measured: the paper rounds, draws the posterior without a seed, and names no versions; "
    "Inception and the VAE round differently on other hardware"
)
_PUBLISHED_INCEPTION_SCORE = (
    "set beforehand, not measured: printed rounded; draws without a published seed, versions that are not named and "
    "other hardware each move it"
)
_PUBLISHED_SHARE = "set beforehand, not measured: printed with two decimals, and one unit of the last for other draws"
_PUBLISHED_SAMPLES = (
    "set beforehand: printed rounded, and FID-50K of one recipe spreads by 1 to 2 % over seeds of training and "
    "sampling (arXiv 2606.20536); the estimator's bias falls with the number of images (arXiv 1911.07023), which is "
    "50,000 on both sides"
)
_DEVIATION = "of three seeds, each within the tolerance of its score"
_CHANGE = "of two scores, each within its tolerance; the mean of three seeds"
_NEAR_EDGES = "counted; rounding on another processor moves values that lie beside the edge of a bin"
_HALF = "where rounding flips a first token, the rest of the image is drawn anew; half precision differs by processor"
_TIMING = "a time depends on the machine and is not compared; the ratios within one run are"
_RATIO = "ratio of two times of one run, on a machine that others may share; a trend and the benchmarks judge speed"

NUM_CLASSES = 1008  # of Inception's logits: the Inception Score of images that are spread evenly over sure classes

METRICS: dict[str, Metric] = {
    "PSNR": Metric(2, 0.0, 0.05, _SAME_NUMBERS),
    "SSIM": Metric(4, 0.0, 0.002, _SAME_NUMBERS, low=-1.0, high=1.0),
    "rFID": Metric(4, 0.03, 0.001, _SAME_NUMBERS),
    "rFID-50K": Metric(2, 0.01, 0.03, _PUBLISHED_RECONSTRUCTION),
    "IS-50K": Metric(1, 0.01, 0.0, _PUBLISHED_INCEPTION_SCORE, low=0.999, high=NUM_CLASSES),
    "FID-50K": Metric(2, 0.03, 0.005, _PUBLISHED_SAMPLES),
    "precision-50K": Metric(2, 0.0, 0.01, _PUBLISHED_SHARE, high=1.0),
    "recall-50K": Metric(2, 0.0, 0.01, _PUBLISHED_SHARE, high=1.0),
    "FID": Metric(3, 0.05, 0.002, _SAMPLING),
    # The bias of the bootstrap moves the ends of the interval, below 0 if FID is small.
    **dict.fromkeys(("FID-low", "FID-high", "FID-bias"), Metric(3, 0.05, 0.002, _SAMPLING, low=-math.inf)),
    **dict.fromkeys(("FID-cleanfid", "FID-cleanfid-legacy", "FID-cleanfid-clean"), Metric(3, 0.05, 0.002, _SAMPLING)),
    "IS": Metric(
        2, 0.015, 0.0, _SAMPLING, low=0.999, high=NUM_CLASSES
    ),  # 1, except for rounding, if all images look alike
    "IS-std": Metric(2, 0.015, 0.0, _SAMPLING),
    **dict.fromkeys(("KID", "KID-std"), Metric(4, 0.10, 0.0002, _SAMPLING, low=-1.0)),
    "precision": Metric(3, 0.0, 0.04, _SAMPLING, high=1.0),
    "recall": Metric(3, 0.0, 0.05, _SAMPLING, high=1.0),
    "class accuracy": Metric(3, 0.0, 0.008, _SAMPLING, high=1.0),
    "± FID": Metric(4, 0.0, 0.004, _DEVIATION),
    "± IS": Metric(2, 0.0, 0.15, _DEVIATION),
    "± class accuracy": Metric(4, 0.0, 0.008, _DEVIATION),
    "± PSNR": Metric(3, 0.0, 0.05, _DEVIATION),
    "± SSIM": Metric(5, 0.0, 0.002, _DEVIATION),
    "± rFID": Metric(5, 0.0, 0.001, _DEVIATION),
    "change of FID": Metric(4, 0.05, 0.004, _CHANGE, low=-math.inf),
    "± change of FID": Metric(4, 0.05, 0.006, _CHANGE),
    "tokens that differ": Metric(4, 0.05, 0.0002, _NEAR_EDGES, high=1.0),
    "generated tokens that differ": Metric(3, 0.15, 0.02, _HALF, high=1.0),
    "images that differ": Metric(3, 0.15, 0.05, _HALF, high=1.0),
    "pixels that differ": Metric(4, 0.02, 0.002, _SAMPLING, high=1.0),
    "fallbacks": Metric(4, 0.15, 0.002, _SAMPLING, high=1.0),
    "acceptance": Metric(3, 0.05, 0.0, _SAMPLING, high=1.0),
    "not covered": Metric(4, 0.15, 0.002, _SAMPLING, high=1.0),
    "deviation of draws": Metric(3, 0.0, 0.02, _SAMPLING),
    "bits per image": Metric(0, 0.0, 0.0, "counted"),
    "relative MSE": Metric(6, 0.01, 0.0, _SAME_NUMBERS),
    "images": Metric(0, 0.0, 0.0, "counted"),
    "parameters": Metric(0, 0.0, 0.0, "counted"),
    "seconds per image": Metric(4, math.inf, 0.0, _TIMING),
    "ms per position": Metric(2, math.inf, 0.0, _TIMING),
    "± ms": Metric(2, math.inf, 0.0, _TIMING),
    "speed-up": Metric(2, 1.0, 0.0, _RATIO),
    "against diffusion": Metric(2, 1.0, 0.0, _RATIO),
}
"""Metrics by the name of a score (`results.score`), without extractor, remark and number of images. Names with `-50K`
are scores of 50,000 images by the published Inception weights, which are compared with the paper."""


LONGEST_NAME = 200  # of a metric; ours have at most 60 characters


def metric(name: str) -> Metric:
    """Return how the metric `name` is printed and compared.

    Raises:
        KeyError: the metric is unknown.
    """
    if len(name) > LONGEST_NAME:
        raise KeyError(name[:LONGEST_NAME])
    read = replace(read_name(name), extractor=None, remark=None)
    whole = replace(read, num_images=None)
    found = METRICS.get(str(read)) or METRICS.get(str(whole)) or METRICS.get(read.metric)
    if found is None:
        raise KeyError(name)
    return found


def tolerance_of(m: Metric) -> str:
    """Format a tolerance for a table."""
    if not m.is_compared:
        return "none"
    parts = [f"{m.relative:.0%}"] * (m.relative > 0) + [f"{m.absolute:g}"] * (m.absolute > 0)
    return " + ".join(parts) or "exact"
