"""The bootstrap of FID: its laws, and its agreement with distances of the resampled features."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from scored_images import EXACT
from torch import Tensor

from tokenbridge.evaluation import metrics
from tokenbridge.evaluation.bootstrap import bootstrap_fid, with_interval
from tokenbridge.evaluation.metrics import Statistics
from tokenbridge.results.score import Score, to_metrics

TRUE_MEAN_SHIFT = 0.5


NORMAL = Statistics(np.zeros(6), np.eye(6))


def draw(seed: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 6, generator=generator)
    x[:, 0] += TRUE_MEAN_SHIFT
    return x


def test_a_resample_without_repeats_is_the_set() -> None:
    for number, columns in ((40, 6), (5, 6)):  # more and fewer images than features
        features = draw(0, number)[:, :columns]
        with patch.object(torch, "randint", lambda *_, **__: torch.arange(number).flip(0)):  # noqa: B023
            replicas = bootstrap_fid(features, NORMAL, 3)
        expected = metrics.frechet_distance(metrics.statistics_of(features), NORMAL)
        # Of five images the covariance is singular, see test_metrics.SINGULAR.
        assert replicas == pytest.approx([expected] * 3, abs=EXACT if number > columns else 1e-6)


def test_resamples_are_distances_of_the_resampled_features() -> None:
    features = draw(1, 30)
    indices = torch.randint(30, (30,), generator=torch.Generator().manual_seed(5))
    expected = metrics.frechet_distance(metrics.statistics_of(features[indices]), NORMAL)
    assert bootstrap_fid(features, NORMAL, 2, seed=5)[0] == pytest.approx(expected, rel=EXACT)
    assert bootstrap_fid(features, NORMAL, 2, seed=6)[0] != pytest.approx(expected, rel=1e-3)


def fid_interval(features: Tensor, seed: int) -> dict[str, float]:
    fid = Score("FID", metrics.frechet_distance(metrics.statistics_of(features), NORMAL))
    return to_metrics([with_interval(fid, features, NORMAL, 200, seed=seed)])


def test_the_interval_knows_spread_and_bias() -> None:
    truth = TRUE_MEAN_SHIFT**2
    fids = np.array([metrics.frechet_distance(metrics.statistics_of(draw(s, 300)), NORMAL) for s in range(400)])
    intervals = [fid_interval(draw(s, 300), s) for s in range(20)]
    for fid, interval in zip(fids, intervals, strict=False):
        assert interval["FID-low"] < fid < interval["FID-high"]
        assert interval["FID"] == fid
    # A normal 95% interval is 3.92 deviations wide; 400 and 20 draws know these numbers to about a tenth.
    width = np.mean([i["FID-high"] - i["FID-low"] for i in intervals])
    assert width == pytest.approx(3.92 * fids.std(), rel=0.2)
    bias = np.mean([i["FID-bias"] for i in intervals])
    assert bias == pytest.approx(fids.mean() - truth, rel=0.3)
    assert bias > 0
    # The law the notes state: four times the images, a quarter of the bias.
    more = np.mean([fid_interval(draw(s, 1200), s)["FID-bias"] for s in range(20)])
    assert more == pytest.approx(bias / 4, rel=0.2)
