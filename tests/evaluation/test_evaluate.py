"""Evaluation: torch-fidelity's and clean-fid's own commands, labels, mutations, and sets that do not go together."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cleanfid.fid
import numpy as np
import pytest
import torch
from cleanfid.inception_torchscript import InceptionV3W
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_images import EXACT, LABEL, NUM_REFERENCE, NUM_SAMPLES, folder_of, random_images
from torch import Tensor, nn

from tokenbridge.data.image_sets import ImageFiles
from tokenbridge.evaluation import evaluate as evaluation
from tokenbridge.evaluation import metrics
from tokenbridge.evaluation.evaluate import evaluate
from tokenbridge.evaluation.inception import CLEANFID_FILE, CLEANFID_URL, load_cleanfid_inception, load_inception
from tokenbridge.evaluation.metrics import Statistics
from tokenbridge.evaluation.reference import Reference
from tokenbridge.results.score import to_metrics
from tokenbridge.utils.files import sha256_of
from tokenbridge.weights.artifacts import ARTIFACTS, INCEPTION

pytest_plugins = ("scored_images",)
pytestmark = pytest.mark.usefixtures("quick_root")

# Means and kernels in float32 (torch-fidelity's command) against float64: 1e-7 of features below 1.
COMMAND = 1e-6


NAMES = {
    "FID": "frechet_inception_distance",
    "IS": "inception_score_mean",
    "IS-std": "inception_score_std",
    "precision": "precision",
    "recall": "recall",
    "KID": "kernel_inception_distance_mean",
    "KID-std": "kernel_inception_distance_std",
}


@pytest.fixture(scope="session")
def command(root: Path, weights: Path) -> dict[str, float]:
    """Return what torch-fidelity's own command prints."""
    arguments = [
        *("--input1", str(root / "seed0"), "--input2", str(root / "reference"), "--cpu", "--json", "--silent"),
        *("--isc", "--fid", "--kid", "--prc", "--kid-subset-size", str(NUM_SAMPLES), "--batch-size", "16"),
        *("--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", str(weights)),
        *("--no-cache", "--save-cpu-ram"),
    ]
    code = "import torch; torch.set_num_threads(1); from torch_fidelity.fidelity import main; main()"
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    printed: dict[str, float] = json.loads(run.stdout)
    return printed


@pytest.mark.usefixtures("own_root")
def test_scores_are_those_of_torch_fidelitys_command(
    root: Path, options: dict[str, Any], command: dict[str, float]
) -> None:
    (scored,) = evaluate([root / "seed0"], root / "reference", **options).sets
    scores = scored.metrics
    assert scored.num_images == NUM_SAMPLES
    for ours, theirs in NAMES.items():
        assert scores[ours + LABEL] == pytest.approx(command[theirs], abs=COMMAND), ours
    # The set must be able to tell: scores that are all different, and not at the ends of their ranges.
    assert scores["FID" + LABEL] > 0.01
    assert scores["KID" + LABEL] > 100 * COMMAND
    assert scores["IS" + LABEL] > 1 + 10 * COMMAND
    assert 0 < scores["recall" + LABEL] != scores["precision" + LABEL] > 0
    # clean-fid's formula, with its own root of the matrix.
    assert scores["FID-cleanfid" + LABEL] == pytest.approx(scores["FID" + LABEL], rel=EXACT)


def test_swapped_sets_would_be_noticed(extracted: tuple[Tensor, Tensor, Reference], command: dict[str, float]) -> None:
    samples, _, reference = extracted
    assert reference.features is not None
    right = metrics.precision_and_recall(samples.double(), reference.features.double())
    swapped = metrics.precision_and_recall(reference.features.double(), samples.double())
    assert right == pytest.approx((command["precision"], command["recall"]), abs=COMMAND)
    assert swapped == (right[1], right[0]) != right


def score_features(features: Tensor, logits: Tensor, reference: Reference) -> dict[str, float]:
    scores, _ = metrics.scores_of(
        features, logits, reference.statistics, reference.features, seed=metrics.SEED, extractor=None
    )
    return to_metrics(scores)


def manifold_shares(reference: Tensor, samples: Tensor, neighbours: int) -> tuple[float, float]:
    """Compute precision and recall as ADM's evaluator defines them, reference first, by loops."""

    def radius(points: Tensor, i: int) -> float:
        others = [(points[i] - points[j]).norm().item() for j in range(len(points)) if j != i]
        return sorted(others)[neighbours - 1]

    def share(points: Tensor, centres: Tensor) -> float:
        radii = [radius(centres, j) for j in range(len(centres))]
        inside = [any((p - c).norm().item() <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return sum(inside) / len(points)

    return share(samples, reference), share(reference, samples)


def test_precision_and_recall_against_loops(extracted: tuple[Tensor, Tensor, Reference]) -> None:
    samples, logits, reference = extracted
    assert reference.features is not None
    scores = score_features(samples, logits, reference)
    expected = manifold_shares(reference.features.double(), samples.double(), 3)
    assert (scores["precision"], scores["recall"]) == pytest.approx(expected, abs=1e-7)  # torch-fidelity: float32 means
    fewer = manifold_shares(reference.features.double(), samples.double(), 2)
    assert (scores["precision"], scores["recall"]) != pytest.approx(fewer, abs=1e-7)


def test_statistics_are_float64(extracted: tuple[Tensor, Tensor, Reference]) -> None:
    features, _, reference = extracted
    exact = metrics.statistics_of(features)
    x = features.double().numpy()
    assert exact.mean.dtype == exact.covariance.dtype == reference.statistics.mean.dtype == np.float64
    mean = x.sum(axis=0) / len(x)
    np.testing.assert_allclose(exact.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(exact.covariance, (x - mean).T @ (x - mean) / (len(x) - 1), atol=1e-15)
    right = metrics.frechet_distance(exact, reference.statistics)
    single = Statistics(exact.mean.astype(np.float32).astype(np.float64), exact.covariance)
    assert metrics.frechet_distance(single, reference.statistics) != pytest.approx(right, rel=EXACT)


def test_a_set_against_itself(root: Path, options: dict[str, Any]) -> None:
    scores = evaluate([root / "seed0"], root / "seed0", **options).sets[0].metrics
    assert scores["FID" + LABEL] == pytest.approx(0, abs=EXACT)
    assert scores["precision" + LABEL] == scores["recall" + LABEL] == 1


@given(seed=st.integers(0, 1000))
@settings(max_examples=3, deadline=None)
def test_the_order_of_the_reference_does_not_matter(extracted: tuple[Tensor, Tensor, Reference], seed: int) -> None:
    features, logits, reference = extracted
    assert reference.features is not None
    permuted = reference.features[torch.randperm(NUM_REFERENCE, generator=torch.Generator().manual_seed(seed))]
    other = Reference("", "", metrics.statistics_of(permuted), permuted, None, NUM_REFERENCE, from_images=True)
    first, second = (score_features(features, logits, r) for r in (reference, other))
    for name in ("FID", "FID-cleanfid", "IS", "precision", "recall"):
        assert first[name] == pytest.approx(second[name], rel=EXACT), name
    assert first["FID"] != pytest.approx(score_features(permuted, logits, reference)["FID"], rel=EXACT)


def test_statistics_from_a_file_are_those_of_the_folder(root: Path, batch: Path, options: dict[str, Any]) -> None:
    folder, file = (
        evaluate([root / "seed0"], reference, **options).sets[0].metrics for reference in (root / "reference", batch)
    )
    assert folder.keys() == file.keys()
    for name in folder:
        # Sums over batches against sums over all. The Inception Score does not see the reference.
        assert file[name] == pytest.approx(folder[name], rel=EXACT), name
    with np.load(batch) as archive:
        assert set(archive.files) == {"mu", "sigma", "num_images", "meta", "arr_0"}
        images = ImageFiles(root / "reference")
        np.testing.assert_array_equal(archive["arr_0"][5], images[5].permute(1, 2, 0).numpy())
        meta = json.loads(str(archive["meta"]))
    assert meta["pixels_sha256"]
    assert meta["published_weights"] is False
    assert "commit" in meta


def test_mu_and_sigma_alone(root: Path, batch: Path, options: dict[str, Any], tmp_path: Path) -> None:
    with np.load(batch) as archive:
        bare = {"mu": archive["mu"].astype(np.float32), "sigma": archive["sigma"]}  # as ADM stores them
    np.savez(tmp_path / "adm.npz", **bare)
    measured = evaluate([root / "seed0"], tmp_path / "adm.npz", **options)
    assert measured.sets[0].metrics.keys() == {n + LABEL for n in ("FID", "FID-cleanfid", "IS", "IS-std")}
    why = measured.not_run["precision", "recall", "KID"]
    assert "only mu and sigma" in why
    assert "arr_0" in why
    assert CLEANFID_URL in measured.not_run["FID-cleanfid-legacy", "FID-cleanfid-clean"]


def test_several_seeds_have_mean_and_deviation(root: Path, weights: Path, options: dict[str, Any]) -> None:
    measured = evaluate([root / "seed0", root / "seed1"], root / "reference", **options)
    values = [scored.metrics["FID" + LABEL] for scored in measured.sets]
    assert values[0] != values[1]
    mean, deviation = to_metrics(measured.mean), to_metrics(measured.deviation)
    assert mean["FID" + LABEL] == pytest.approx(sum(values) / 2, rel=1e-12)
    assert deviation["FID" + LABEL] == pytest.approx(abs(values[0] - values[1]) / 2**0.5, rel=1e-9)
    assert mean.keys() == deviation.keys()
    assert not {name for name in mean if "std" in name or name == "images"}
    assert min(values) not in mean.values()
    assert len(set(measured.data_sha256.values())) == 3
    assert measured.weights_sha256 == {"inception": sha256_of(weights)}


def test_interval_of_images(root: Path, options: dict[str, Any]) -> None:
    options["num_bootstrap"] = 20
    measured = evaluate([root / "seed0"], root / "reference", **options)
    scores = measured.sets[0].metrics
    names = ("FID", "FID-cleanfid", "IS", "IS-std", "precision", "recall", "KID", "KID-std")
    assert list(scores) == [name + LABEL for name in (*names, "FID-low", "FID-high", "FID-bias")]
    assert scores["FID-low" + LABEL] < scores["FID" + LABEL] < scores["FID-high" + LABEL]
    notes = " ".join(measured.notes)
    assert "biased" in notes
    assert "It does not cover the choice of the reference images" in notes
    twice = replace(measured, sets=measured.sets * 2)
    assert not {name for name in to_metrics(twice.mean) if name.startswith(("FID-low", "FID-high", "FID-bias"))}


class Layers(nn.Module):
    """Features of 12 patches of a 299 x 299 image, followed by zeros."""

    def forward(self, x: Tensor) -> Tensor:
        patches = nn.functional.adaptive_avg_pool2d(x.square(), (2, 2)).flatten(1)  # blurred or not: a difference
        return nn.functional.pad(patches, (0, 2036))


class Base(nn.Module):
    """The interface of NVIDIA's TorchScript Inception, which resizes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert return_features
        y = nn.functional.interpolate(x, size=[299, 299], mode="bilinear", align_corners=False)
        return self.layers.forward((y - 128) / 128)


@pytest.fixture(scope="session")
def cleanfid_weights(root: Path) -> Path:
    torch.jit.script(Base()).save(str(root / CLEANFID_FILE))
    return root / CLEANFID_FILE


def test_whole_number_is_clean_fids(
    root: Path, batch: Path, cleanfid_weights: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenbridge.evaluation.inception.CLEANFID_SHA256", sha256_of(cleanfid_weights))
    options["cleanfid_inception"] = replace(load_cleanfid_inception(cleanfid_weights), published=False)
    measured = evaluate([root / "seed0"], root / "reference", **options)
    scores = measured.sets[0].metrics
    assert set(measured.weights_sha256) == {"inception", "clean-fid's inception"}
    assert not measured.not_run
    for mode, name in (("legacy_tensorflow", "FID-cleanfid-legacy"), ("clean", "FID-cleanfid-clean")):
        network = InceptionV3W(str(root), download=False, resize_inside=mode == "legacy_tensorflow")
        folders = [str(root / "seed0"), str(root / "reference")]
        expected = cleanfid.fid.compute_fid(
            *folders, mode=mode, custom_feat_extractor=network, num_workers=0, device="cpu", verbose=False
        )
        # clean-fid averages in float32, and scales pixels to 1 and back.
        assert scores[name + LABEL] == pytest.approx(expected, rel=1e-5), mode
    assert scores["FID-cleanfid-legacy" + LABEL] != pytest.approx(scores["FID-cleanfid-clean" + LABEL], rel=1e-3)

    against_file = evaluate([root / "seed0"], batch, **options)
    assert "needs the images" in against_file.not_run["FID-cleanfid-clean",]
    assert "FID-cleanfid-legacy" + LABEL in against_file.sets[0].metrics


def test_only_published_weights_and_many_images_give_the_name_fid(
    root: Path, options: dict[str, Any], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"has 18 images.*allow-few"):
        evaluate([root / "seed0"], root / "reference", **{**options, "allow_few": False})
    with pytest.raises(ValueError, match=r"not the published weights-inception.*allow-other-inception"):
        load_inception(weights)
    scores = evaluate([root / "seed0"], root / "reference", **options).sets[0].metrics
    assert all(name.endswith(LABEL) for name in scores)

    monkeypatch.setitem(ARTIFACTS, INCEPTION, replace(ARTIFACTS[INCEPTION], sha256=sha256_of(weights)))
    monkeypatch.setattr(evaluation, "FEW", NUM_SAMPLES)
    options = {**options, "allow_few": False, "inception": load_inception(weights)}
    plain = evaluate([root / "seed0"], root / "reference", **options).sets[0].metrics
    assert plain == {name.removesuffix(LABEL): value for name, value in scores.items()}
    monkeypatch.setattr(evaluation, "FEW", NUM_SAMPLES + 1)
    with pytest.raises(ValueError, match="allow-few"):
        evaluate([root / "seed0"], root / "reference", **options)


def test_few_reference_images_are_refused_too(
    root: Path, options: dict[str, Any], batch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "FEW", NUM_REFERENCE)
    more = folder_of(root / "more", random_images(4, 2))
    with pytest.raises(ValueError, match="more has 2 images"):
        evaluate([root / "reference"], more, **{**options, "allow_few": False})
    monkeypatch.setattr(evaluation, "FEW", NUM_SAMPLES)
    evaluate([root / "seed0"], batch, **{**options, "allow_few": False})


def test_sets_that_do_not_go_together(root: Path, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"18 images.*reference has 20"):
        evaluate([root / "seed0", root / "reference"], root / "reference", **options)
    with pytest.raises(ValueError, match="same images"):
        evaluate([root / "seed0", root / "seed0"], root / "reference", **options)
    with pytest.raises(ValueError, match="no samples"):
        evaluate([], root / "reference", **options)
    small = folder_of(tmp_path / "small", random_images(9, 2)[..., :16, :16])
    with pytest.raises(ValueError, match=r"\[16, 16\].*\[32, 32\]"):
        evaluate([small], root / "reference", **options)
    with pytest.raises(ValueError, match="bootstrap"):
        evaluate([root / "seed0"], root / "reference", **{**options, "num_bootstrap": 1})
