"""Metrics: exact properties, agreement of three implementations, and mutations that must not go unnoticed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_fid import fid_features_to_statistics

from tokenbridge.data.images import pixels_to_images
from tokenbridge.evaluation import metrics
from tokenbridge.evaluation.classifier import Classifier
from tokenbridge.results.score import to_metrics
from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

# Three float64 computations of one formula on regular covariances: 1e-16 times the condition of a 16x16
# eigenvalue problem. Observed 1e-14; the mildest mutation below (a float32 mean) moves the distance by 4e-8.
REGULAR = 1e-10
# Singular covariances, or a distance of 0: eigenvalues of 1e-16 that should be 0 are 1e-8 under the square
# root, once per feature, relative to the covariances' trace. Observed 2e-6 for 64 features of variance 1.
SINGULAR = 1e-5


def random_images(seed: int, count: int, *, channels: int = 1, offset: int = 0) -> Tensor:
    """Draw images with a gradient of random strength under noise, so that features differ between images."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(count, channels, 1, 1, generator=generator)
    noise = torch.rand(count, channels, 16, 16, generator=generator)
    ramp = torch.linspace(0, 1, 16)
    return ((strength * ramp + noise) * 100 + offset).to(torch.uint8)


def make_classifier(*, num_features: int = 16, channels: int = 1) -> Classifier:
    torch.manual_seed(7)
    classifier: Classifier = Classifier(image_size=16, in_channels=channels, widths=(8, 8, 16, num_features))
    return classifier


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return make_classifier()


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    return random_images(1, 120), random_images(2, 90, offset=40)


def independent_distance(a: Tensor, b: Tensor) -> float:
    """Compute the distance from eigenvalues of the symmetric sqrt(S_a) S_b sqrt(S_a), sums written out."""
    means, covariances = [], []
    for x in (a.double().numpy(), b.double().numpy()):
        mean = x.sum(axis=0) / len(x)
        means.append(mean)
        covariances.append((x - mean).T @ (x - mean) / (len(x) - 1))
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    trace = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariances[1] @ root), 0)).sum()
    difference = means[0] - means[1]
    return float(difference @ difference + sum(np.trace(c) for c in covariances) - 2 * trace)


def plain_features(images: Tensor, classifier: Classifier) -> Tensor:
    """Extract features without any of the code under test."""
    with torch.no_grad():
        features: Tensor = classifier.eval()(pixels_to_images(images))[0]
    return features


def score(*arguments: Any, **options: Any) -> dict[str, float]:
    """Return scores by the names of their metrics, without the extractor's."""
    return to_metrics(replace(found, extractor=None) for found in metrics.score(*arguments, **options))


def cleanfid_distance(a: Tensor, b: Tensor) -> float:
    return metrics.cleanfid_distance(metrics.statistics_of(a), metrics.statistics_of(b))


# --- the Fréchet distance: main (torch-fidelity), cross-check (clean-fid), independent (numpy) ---


def test_three_implementations_agree(classifier: Classifier, pair: tuple[Tensor, Tensor]) -> None:
    scores = score(*pair, classifier)
    expected = independent_distance(*(plain_features(images, classifier) for images in pair))
    assert expected > 1e-4  # or agreement would say nothing
    # Batches of 256 and one pass over everything may round float32 features differently, by 1e-7.
    assert scores["FID"] == pytest.approx(expected, rel=1e-5)
    own = independent_distance(*(metrics.extract_features(images, classifier)[0] for images in pair))
    assert scores["FID"] == pytest.approx(own, rel=REGULAR)
    assert scores["FID-cleanfid"] == pytest.approx(own, rel=REGULAR)


@pytest.mark.parametrize(
    "mutate",
    [
        pytest.param(lambda a, b: (a.mean(0).float().double() + a - a.mean(0), b), id="float32-mean"),
        pytest.param(lambda a, b: (a - a.mean(0), b - b.mean(0)), id="no-mean"),
        pytest.param(lambda a, b: (a[1:], b), id="first-image-lost"),
        pytest.param(lambda a, b: (torch.cat([a, a[-10:]]), b), id="last-batch-twice"),
        pytest.param(lambda a, b: (a.half().double(), b.half().double()), id="half-precision"),
        pytest.param(lambda a, b: (a * (1 - 1 / len(a)) ** 0.5, b), id="covariance-over-n"),
        pytest.param(lambda a, b: (a.flip(1), b), id="other-feature-order"),
    ],
)
def test_the_agreement_would_notice(
    mutate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    classifier: Classifier,
    pair: tuple[Tensor, Tensor],
) -> None:
    features = tuple(metrics.extract_features(images, classifier)[0] for images in pair)
    right = cleanfid_distance(*features)
    assert cleanfid_distance(*mutate(*features)) != pytest.approx(right, rel=REGULAR)


def test_float32_features_would_be_averaged_in_float32(classifier: Classifier, pair: tuple[Tensor, Tensor]) -> None:
    # Why `statistics_of` widens: torch-fidelity keeps the precision it is given for the mean.
    features = [metrics.extract_features(images, classifier)[0] for images in pair]
    right = metrics.frechet_distance(*(metrics.statistics_of(x) for x in features))
    assert metrics.frechet_distance(*(metrics.statistics_of(x.float()) for x in features)) == right
    narrow = [fid_features_to_statistics(x.float()) for x in features]
    assert narrow[0]["mu"].dtype == np.float32
    mutated = metrics.frechet_distance(*(metrics.Statistics(x["mu"], x["sigma"]) for x in narrow))
    assert mutated != pytest.approx(right, rel=REGULAR)


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(2, 40),
    columns=st.integers(2, 20),
    kind=st.sampled_from("rcd"),
)
@settings(max_examples=30, deadline=None)
def test_distance_is_finite_symmetric_and_zero_on_itself(seed: int, rows: int, columns: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, columns, generator=generator)
    b = torch.randn(rows + 3, columns, generator=generator) * 2 + 1
    if kind == "c":  # a feature that is constant in both sets
        a[:, 0] = b[:, 0] = 1.0
    if kind == "d":  # a feature that depends on another
        a[:, 0], b[:, 0] = a[:, 1], b[:, 1]
    tolerance = SINGULAR * columns
    distance = cleanfid_distance(a, b)
    assert np.isfinite(distance)
    assert distance == pytest.approx(cleanfid_distance(b, a), abs=tolerance)
    assert distance == pytest.approx(independent_distance(a, b), abs=tolerance)
    assert 0 <= cleanfid_distance(a, a) < tolerance
    # A shift leaves the covariance: the distance is the shift's squared length.
    assert cleanfid_distance(a, a + 2) == pytest.approx(4 * columns, abs=tolerance)


def test_fewer_images_than_features(pair: tuple[Tensor, Tensor]) -> None:
    scores = score(pair[0][:5], pair[1][:9], make_classifier(num_features=64))
    assert all(np.isfinite(value) for value in scores.values())
    assert scores["FID"] == pytest.approx(scores["FID-cleanfid"], abs=SINGULAR)


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 2), AssertionError),
        (torch.zeros(1, 3), torch.zeros(4, 3), AssertionError),
        (torch.zeros(4), torch.zeros(4), AssertionError),
        (torch.full((4, 3), torch.nan), torch.zeros(4, 3), ValueError),
    ],
)
def test_distance_refuses(a: Tensor, b: Tensor, error: type[Exception]) -> None:
    for distance in (metrics.cleanfid_distance, metrics.frechet_distance):
        with pytest.raises(error, match=r"[Ff]eatures"):
            distance(metrics.statistics_of(a), metrics.statistics_of(b))


# --- all scores ---


def test_identical_sets(classifier: Classifier, pair: tuple[Tensor, Tensor]) -> None:
    scores = score(pair[0], pair[0], classifier)
    assert scores["FID"] == pytest.approx(0, abs=SINGULAR)
    assert 0 <= scores["FID-cleanfid"] < SINGULAR
    assert scores["precision"] == scores["recall"] == 1
    # Every subset is the whole set, so KID has no spread and is the unbiased estimate written out below: a
    # little less than 0, because pairs of an image with itself count in the mixed term only.
    x, _ = metrics.extract_features(pair[0], classifier)
    kernel = (x @ x.T / x.shape[1] + 1) ** 3
    unequal = (kernel.sum() - kernel.trace()) / (len(x) * (len(x) - 1))
    assert scores["KID"] == pytest.approx(2 * (unequal - kernel.mean()).item(), rel=1e-9)  # float64 sums
    assert scores["KID-std"] < 1e-12
    assert scores["KID"] < 0 < score(*pair, classifier)["KID"]
    assert 1 <= scores["IS"] <= 10


def test_precision_counts_samples_and_recall_the_reference(classifier: Classifier, pair: tuple[Tensor, Tensor]) -> None:
    images, _ = pair
    narrow = images[:1].repeat(20, 1, 1, 1)  # one good image again and again: precise, with no variety
    scores = score(narrow, images, classifier)
    assert scores["precision"] == 1
    assert scores["recall"] < 0.1


def test_swapping_the_sets(classifier: Classifier, pair: tuple[Tensor, Tensor]) -> None:
    forth, back = score(*pair, classifier), score(pair[1], pair[0], classifier)
    assert forth["FID"] == pytest.approx(back["FID"], rel=REGULAR)
    assert (forth["precision"], forth["recall"]) == (back["recall"], back["precision"])


def test_inception_score_of_the_softmax(classifier: Classifier, pair: tuple[Tensor, Tensor]) -> None:
    # Nine images make nine splits of one image each, and one image scores exp(0) whatever its classes.
    assert score(pair[0][:9], pair[1], classifier)["IS"] == pytest.approx(1)
    _, logits = metrics.extract_features(pair[0], classifier)
    order = np.random.RandomState(5).permutation(len(logits))
    chunks = logits.softmax(1)[order].chunk(10)
    parts = [(p * (p / p.mean(0)).log()).sum(1).mean().exp().item() for p in chunks]
    scores = score(*pair, classifier, seed=5)
    assert scores["IS"] == pytest.approx(np.mean(parts), rel=1e-12)  # float64 sums of ten terms
    assert scores["IS-std"] == pytest.approx(np.std(parts), rel=1e-6)  # of nearly equal numbers


def test_score_repeats_and_leaves_no_trace(
    pair: tuple[Tensor, Tensor],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    classifier = make_classifier().train()
    first = score(*pair, classifier)
    assert score(*pair, classifier) == first
    assert score(*pair, classifier, seed=1)["IS"] != first["IS"]
    assert classifier.training
    assert all(parameter.requires_grad for parameter in classifier.parameters())
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.rglob("*"))  # no cache


def test_each_classifier_is_its_own_extractor(pair: tuple[Tensor, Tensor]) -> None:
    small, large = make_classifier(num_features=8), make_classifier(num_features=24)
    once = score(*pair, small)
    assert score(*pair, large)["FID"] != pytest.approx(once["FID"], rel=1e-3)
    assert score(*pair, small) == once


def test_torch_fidelity_knows_every_argument(classifier: Classifier, pair: tuple[Tensor, Tensor]) -> None:
    # It ignores names it does not know; these two functions take any.
    for name in ("kid_features_to_metric", "prc_features_to_metric"):
        with mock.patch.object(metrics, name, wraps=getattr(metrics, name)) as spy:
            score(*pair, classifier)
        assert spy.call_args.kwargs
        assert spy.call_args.kwargs.keys() <= DEFAULTS.keys()


def test_colour_images() -> None:
    scores = score(random_images(1, 30, channels=3), random_images(2, 30, channels=3), make_classifier(channels=3))
    assert np.isfinite(scores["FID"])


def test_scores_carry_the_extractors_name(classifier: Classifier, pair: tuple[Tensor, Tensor]) -> None:
    labelled = to_metrics(metrics.score(*pair, classifier, extractor="digits"))
    assert {"FID-digits", "IS-digits", "precision-digits", "recall-digits", "KID-digits"} < labelled.keys()
    assert all(name.endswith("-digits") for name in labelled)
    with pytest.raises(AssertionError, match="FID- "):
        metrics.score(*pair, classifier, extractor=" ")


@pytest.mark.parametrize(
    ("samples", "reference", "error", "message"),
    [
        (torch.zeros(4, 1, 16, 16), random_images(0, 4), AssertionError, "uint8"),
        (random_images(0, 4), torch.zeros(4, 1, 16, 16), AssertionError, "uint8"),
        (random_images(0, 4)[0], random_images(0, 4), AssertionError, "N, C, H, W"),
        (random_images(0, 1), random_images(0, 4), AssertionError, "at least 2"),
        (random_images(0, 4), random_images(0, 1), AssertionError, "at least 2"),
        (random_images(0, 4), random_images(0, 4, channels=3), UserError, "classifier takes"),
        (random_images(0, 4, channels=3), random_images(0, 4, channels=3), UserError, "classifier takes"),
        (random_images(0, 4)[..., :8], random_images(0, 4)[..., :8], UserError, "classifier takes"),
    ],
)
def test_score_refuses(
    samples: Tensor, reference: Tensor, error: type[Exception], message: str, classifier: Classifier
) -> None:
    with pytest.raises(error, match=message):
        score(samples, reference, classifier)


# --- features and class accuracy ---


@given(batch_size=st.integers(1, 40))
@settings(max_examples=10, deadline=None)
def test_features_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    images, classifier = random_images(3, 30), make_classifier()
    features, logits = metrics.extract_features(images, classifier, batch_size)
    assert (features.shape, logits.shape) == ((30, 16), (30, 10))
    assert features.dtype == logits.dtype == torch.float64
    # Convolutions of other batch sizes may add up float32 in another order.
    torch.testing.assert_close(features.float(), plain_features(images, classifier), rtol=1e-4, atol=1e-6)


class ReadsFirstPixel(Classifier):
    """Takes the value of the first pixel for the class."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        classes = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
        return images.flatten(1), F.one_hot(classes, 10).float()


def test_class_accuracy() -> None:
    rigged = ReadsFirstPixel(image_size=16, widths=(8, 8, 8, 8))
    images, labels = random_images(4, 10), torch.arange(10)
    images[:, 0, 0, 0] = labels.to(torch.uint8)
    assert metrics.class_accuracy(images, labels, rigged, batch_size=3) == 1.0
    assert metrics.class_accuracy(images, (labels + 1) % 10, rigged) == 0.0
    assert metrics.class_accuracy(images, labels.clamp(max=6), rigged) == 0.7
    for wrong in (labels[:9], labels[:, None]):
        with pytest.raises(AssertionError, match="labels"):
            metrics.class_accuracy(images, wrong, rigged)


# --- reconstructions ---


def test_psnr_of_a_known_error() -> None:
    images = torch.full((3, 3, 16, 16), 100, dtype=torch.uint8)
    worse = images.clone()
    worse[1] += 5  # mean squared error 25
    worse[2, :, ::2] -= 10  # mean squared error 50; uint8 must not wrap around
    expected = [np.inf, 20 * np.log10(255 / 5), 10 * np.log10(255**2 / 50)]
    assert metrics.psnr(images, worse).tolist() == pytest.approx(expected, rel=1e-12)
    assert metrics.psnr(images, worse).dtype == torch.float64


def test_ssim_of_known_images() -> None:
    images = random_images(5, 3, channels=3)
    flat = torch.full_like(images[2], 100)
    images[2], other = flat, images.clone()
    other[1] = images[1].flip(-1)
    other[2] = flat + 50
    values = metrics.ssim(images, other)
    assert values[0] == 1
    assert values[1] < 0.5
    # Without variance only the luminance term is left: (2ab + c) / (a² + b² + c) with c = (0.01 * 255)².
    c = (0.01 * 255) ** 2
    assert values[2].item() == pytest.approx((2 * 100 * 150 + c) / (100**2 + 150**2 + c), rel=1e-9)


@given(seed=st.integers(0, 100), noise=st.integers(1, 20))
@settings(max_examples=10, deadline=None)
def test_more_noise_scores_lower(seed: int, noise: int) -> None:
    images = random_images(seed, 2)
    generator = torch.Generator().manual_seed(seed)
    error = torch.randint(0, 2, images.shape, generator=generator, dtype=torch.uint8)
    little, much = images + noise * error, images + 2 * noise * error  # images stay below 201: no overflow
    for metric in (metrics.psnr, metrics.ssim):
        assert (metric(images, little) > metric(images, much)).all()


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
def test_reconstructions_refuse(metric: Callable[[Tensor, Tensor], Tensor]) -> None:
    images = random_images(6, 2)
    for wrong in (images.float(), images[:1], images[:, :, 1:], images[0], images[:0]):
        with pytest.raises(AssertionError, match=r"econstructions|images"):
            metric(images, wrong)


def test_images_smaller_than_the_window_of_ssim() -> None:
    images = random_images(6, 2)[:, :, :6]
    with pytest.raises(UserError, match="6 x 16"):
        metrics.ssim(images, images)
    assert metrics.psnr(images, images).isinf().all()


def test_a_cross_check_that_fails_is_not_run_and_loses_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    def imaginary(*_: object) -> float:
        raise ValueError("Imaginary component 0.018")

    features, logits = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.randn(12, 4)
    statistics = metrics.statistics_of(features)
    complete, nothing = metrics.scores_of(features, logits, statistics, features, seed=0, extractor="digits")
    monkeypatch.setattr("cleanfid.fid.frechet_distance", imaginary)
    scores, not_run = metrics.scores_of(features, logits, statistics, features, seed=0, extractor="digits")
    assert nothing == {}
    assert scores == [score for score in complete if score.metric != "FID-cleanfid"]
    ((names, why),) = not_run.items()
    assert names == ("FID-cleanfid",)
    assert "Imaginary component 0.018" in why
