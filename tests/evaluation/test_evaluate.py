"""Evaluation: torch-fidelity's and clean-fid's own commands, laws of the bootstrap, mutations, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import cleanfid.fid
import numpy as np
import pytest
import torch
from cleanfid.inception_torchscript import InceptionV3W
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from tokenbridge.cli import main as cli
from tokenbridge.data.image_sets import ImageArray, ImageFiles, open_images
from tokenbridge.data.pictures import save_images
from tokenbridge.evaluation import evaluate as evaluation
from tokenbridge.evaluation import features as evaluation_features
from tokenbridge.evaluation import metrics
from tokenbridge.evaluation.bootstrap import bootstrap_fid, fid_interval
from tokenbridge.evaluation.evaluate import evaluate, score_features
from tokenbridge.evaluation.features import NUM_FEATURES, Inception, inception_features, load_inception
from tokenbridge.evaluation.inception import write_random_inception
from tokenbridge.evaluation.metrics import Statistics
from tokenbridge.evaluation.reference import Reference, load_reference, make_reference
from tokenbridge.results import markdown
from tokenbridge.results import schema as results
from tokenbridge.utils.files import sha256_of
from tokenbridge.weights.artifacts import ARTIFACTS, FOLDER_VARIABLE, INCEPTION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NUM_SAMPLES, NUM_REFERENCE, SIZE = 18, 20, 32
LABEL = f"-other-inception ({NUM_SAMPLES} images)"
# Means and kernels in float32 (torch-fidelity's command) against float64: 1e-7 of features below 1.
COMMAND = 1e-6
# Two float64 computations of one formula. Fewer features than images are not 0 (`weights`), so that no rounding
# error of an eigenvalue that should be 0 goes through a square root.
EXACT = 1e-9


def random_images(seed: int, number: int, offset: int = 0) -> Tensor:
    """Draw images [N, 3, H, W] with a gradient of random strength under noise, so that features differ."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(number, 3, 1, 1, generator=generator)
    noise = torch.rand(number, 3, SIZE, SIZE, generator=generator)
    return ((strength * torch.linspace(0, 1, SIZE) + noise) * 100 + offset).to(torch.uint8)


def folder_of(path: Path, images: Tensor) -> Path:
    save_images(path, images)
    return path


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images of two seeds and of a reference."""
    folder = tmp_path_factory.mktemp("evaluation")
    folder_of(folder / "seed0", random_images(1, NUM_SAMPLES))
    folder_of(folder / "seed1", random_images(2, NUM_SAMPLES))
    folder_of(folder / "reference", random_images(3, NUM_REFERENCE, offset=20))
    return folder


@pytest.fixture(scope="session")
def weights(root: Path) -> Path:
    """Return random weights in torch-fidelity's format; about ten of the features are not 0."""
    file = root / "random.pth"
    write_random_inception(file)
    tensors = torch.load(file, weights_only=True)
    branches = ("branch1x1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool")
    for branch in branches:
        tensors[f"Mixed_7c.{branch}.bn.weight"][12 if branch == "branch1x1" else 0 :] = 0
    tensors["fc.weight"] *= 50  # classes that differ from image to image
    torch.save(tensors, file)
    return file


@pytest.fixture(scope="session")
def inception(weights: Path) -> Inception:
    return load_inception(weights, allow_other=True)


@pytest.fixture
def options(root: Path, weights: Path) -> dict[str, Any]:
    """Return the arguments that let these samples pass."""
    return {
        "inception": weights,
        "allow_other_inception": True,
        "allow_few": True,
        "num_bootstrap": 0,
        "batch_size": 16,
        "cache": root / "features",
    }


@pytest.fixture(scope="session")
def extracted(root: Path, inception: Inception) -> tuple[Tensor, Tensor, Reference]:
    """Return features and logits of seed0, and the reference."""
    cached: dict[str, Any] = {"batch_size": 16, "cache": root / "features"}
    features, logits = inception_features(open_images(root / "seed0"), inception, **cached)
    return features, logits, load_reference(root / "reference", inception, **cached)


@pytest.fixture
def own_root() -> None:
    """Ask for clean-fid's own distance."""


@pytest.fixture(autouse=True)
def quick_root(request: pytest.FixtureRequest) -> Iterator[None]:
    """Replace clean-fid's distance, whose root of a 2048 x 2048 matrix takes 8 s, where it is not what is tested."""

    def distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
        used = np.flatnonzero(cov_a.diagonal() + cov_b.diagonal() + mean_a**2 + mean_b**2)  # the others are all 0
        pair = (Statistics(m[used], c[np.ix_(used, used)]) for m, c in ((mean_a, cov_a), (mean_b, cov_b)))
        return metrics.fidelity_distance(*pair)

    if "own_root" in request.fixturenames:
        yield
    else:
        with patch.object(cleanfid.fid, "frechet_distance", distance):
            yield


def by_label(measured: results.Results) -> dict[str, results.Row]:
    return {row.id.removeprefix("evaluation/"): row for row in measured.rows}


# --- the numbers ---


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


NAMES = {
    "FID": "frechet_inception_distance",
    "IS": "inception_score_mean",
    "IS-std": "inception_score_std",
    "precision": "precision",
    "recall": "recall",
    "KID": "kernel_inception_distance_mean",
    "KID-std": "kernel_inception_distance_std",
}


@pytest.mark.usefixtures("own_root")
def test_scores_are_those_of_torch_fidelitys_command(
    root: Path, options: dict[str, Any], command: dict[str, float]
) -> None:
    measured = evaluate([root / "seed0"], root / "reference", **options)
    scores = by_label(measured)["1"].metrics
    assert scores["images"] == NUM_SAMPLES
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
    right = metrics.fidelity_distance(exact, reference.statistics)
    single = Statistics(exact.mean.astype(np.float32).astype(np.float64), exact.covariance)
    assert metrics.fidelity_distance(single, reference.statistics) != pytest.approx(right, rel=EXACT)


def test_a_set_against_itself(root: Path, options: dict[str, Any]) -> None:
    scores = by_label(evaluate([root / "seed0"], root / "seed0", **options))["1"].metrics
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


@pytest.fixture(scope="session")
def batch(root: Path, weights: Path) -> Path:
    """Return the reference as .npz in the format of ADM's reference batch."""
    file = root / "batch.npz"
    meta = make_reference(
        str(root / "reference"),
        file,
        inception=weights,
        image_size=SIZE,
        keep_images=NUM_REFERENCE,
        allow_other_inception=True,
        batch_size=16,
    )
    assert meta["num_images"] == NUM_REFERENCE
    return file


def test_statistics_from_a_file_are_those_of_the_folder(root: Path, batch: Path, options: dict[str, Any]) -> None:
    folder, file = (
        by_label(evaluate([root / "seed0"], reference, **options))["1"].metrics
        for reference in (root / "reference", batch)
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
    measured = by_label(evaluate([root / "seed0"], tmp_path / "adm.npz", **options))
    assert measured["1"].metrics.keys() == {"images", *(n + LABEL for n in ("FID", "FID-cleanfid", "IS", "IS-std"))}
    why = measured["precision, recall, KID"].not_run
    assert why is not None
    assert "only mu and sigma" in why
    assert "arr_0" in why
    why = measured["FID-cleanfid-legacy, FID-cleanfid-clean"].not_run
    assert why is not None
    assert evaluation_features.CLEANFID_URL in why


def test_several_seeds_have_mean_and_deviation(root: Path, options: dict[str, Any]) -> None:
    measured = evaluate([root / "seed0", root / "seed1"], root / "reference", **options)
    rows = by_label(measured)
    values = [rows[i].metrics["FID" + LABEL] for i in ("1", "2")]
    assert values[0] != values[1]
    assert rows["mean"].metrics["FID" + LABEL] == pytest.approx(sum(values) / 2, rel=1e-12)
    assert rows["std"].metrics["FID" + LABEL] == pytest.approx(abs(values[0] - values[1]) / 2**0.5, rel=1e-9)
    assert rows["mean"].metrics.keys() == rows["std"].metrics.keys()
    assert not {name for name in rows["mean"].metrics if "std" in name or name == "images"}
    assert min(values) not in rows["mean"].metrics.values()
    data = measured.provenance.data_sha256
    assert len(set(data.values())) == 3
    assert measured.provenance.weights_sha256 == {"inception": sha256_of(options["inception"])}


# --- the bootstrap ---

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
        expected = metrics.fidelity_distance(metrics.statistics_of(features), NORMAL)
        # Of five images the covariance is singular, see test_metrics.SINGULAR.
        assert replicas == pytest.approx([expected] * 3, abs=EXACT if number > columns else 1e-6)


def test_resamples_are_distances_of_the_resampled_features() -> None:
    features = draw(1, 30)
    indices = torch.randint(30, (30,), generator=torch.Generator().manual_seed(5))
    expected = metrics.fidelity_distance(metrics.statistics_of(features[indices]), NORMAL)
    assert bootstrap_fid(features, NORMAL, 2, seed=5)[0] == pytest.approx(expected, rel=EXACT)
    assert bootstrap_fid(features, NORMAL, 2, seed=6)[0] != pytest.approx(expected, rel=1e-3)


def test_the_interval_knows_spread_and_bias() -> None:
    truth = TRUE_MEAN_SHIFT**2
    fids = np.array([metrics.fidelity_distance(metrics.statistics_of(draw(s, 300)), NORMAL) for s in range(400)])
    intervals = [fid_interval(draw(s, 300), NORMAL, 200, seed=s) for s in range(20)]
    for fid, interval in zip(fids, intervals, strict=False):
        assert interval["FID-low"] < fid < interval["FID-high"]
    # A normal 95% interval is 3.92 deviations wide; 400 and 20 draws know these numbers to about a tenth.
    width = np.mean([i["FID-high"] - i["FID-low"] for i in intervals])
    assert width == pytest.approx(3.92 * fids.std(), rel=0.2)
    bias = np.mean([i["FID-bias"] for i in intervals])
    assert bias == pytest.approx(fids.mean() - truth, rel=0.3)
    assert bias > 0
    # The law the notes state: four times the images, a quarter of the bias.
    more = np.mean([fid_interval(draw(s, 1200), NORMAL, 200, seed=s)["FID-bias"] for s in range(20)])
    assert more == pytest.approx(bias / 4, rel=0.2)


def test_interval_of_images(root: Path, options: dict[str, Any]) -> None:
    options["num_bootstrap"] = 20
    measured = evaluate([root / "seed0"], root / "reference", **options)
    scores = by_label(measured)["1"].metrics
    assert scores["FID-low" + LABEL] < scores["FID" + LABEL] < scores["FID-high" + LABEL]
    notes = " ".join(measured.provenance.settings["notes"])
    assert "biased" in notes
    assert "not the choice of the reference images" in notes
    mean, _ = evaluation._rows_over_sets([scores, scores])
    assert not {name for name in mean.metrics if name.startswith(("FID-low", "FID-high", "FID-bias"))}


# --- clean-fid's own features ---


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
    torch.jit.script(Base()).save(str(root / evaluation_features.CLEANFID_FILE))
    return root / evaluation_features.CLEANFID_FILE


def test_whole_number_is_clean_fids(root: Path, batch: Path, cleanfid_weights: Path, options: dict[str, Any]) -> None:
    options["cleanfid_inception"] = cleanfid_weights
    measured = evaluate([root / "seed0"], root / "reference", **options)
    scores = by_label(measured)["1"].metrics
    assert set(measured.provenance.weights_sha256) == {"inception", "clean-fid's inception"}
    assert not [row for row in measured.rows if row.not_run]
    for mode, name in (("legacy_tensorflow", "FID-cleanfid-legacy"), ("clean", "FID-cleanfid-clean")):
        network = InceptionV3W(str(root), download=False, resize_inside=mode == "legacy_tensorflow")
        folders = [str(root / "seed0"), str(root / "reference")]
        expected = cleanfid.fid.compute_fid(
            *folders, mode=mode, custom_feat_extractor=network, num_workers=0, device="cpu", verbose=False
        )
        # clean-fid averages in float32, and scales pixels to 1 and back.
        assert scores[name + LABEL] == pytest.approx(expected, rel=1e-5), mode
    assert scores["FID-cleanfid-legacy" + LABEL] != pytest.approx(scores["FID-cleanfid-clean" + LABEL], rel=1e-3)

    against_file = by_label(evaluate([root / "seed0"], batch, **options))
    why = against_file["FID-cleanfid-clean"].not_run
    assert why is not None
    assert "needs the images" in why
    assert "FID-cleanfid-legacy" + LABEL in against_file["1"].metrics


# --- weights, labels, cache ---


def test_only_published_weights_and_many_images_give_the_name_fid(
    root: Path, options: dict[str, Any], weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"has 18 images.*allow-few"):
        evaluate([root / "seed0"], root / "reference", **{**options, "allow_few": False})
    with pytest.raises(ValueError, match=r"not the published weights-inception.*allow-other-inception"):
        evaluate([root / "seed0"], root / "reference", **{**options, "allow_other_inception": False})
    scores = by_label(evaluate([root / "seed0"], root / "reference", **options))["1"].metrics
    assert all(name == "images" or name.endswith(LABEL) for name in scores)

    monkeypatch.setitem(ARTIFACTS, INCEPTION, replace(ARTIFACTS[INCEPTION], sha256=sha256_of(weights)))
    monkeypatch.setattr(evaluation, "FEW", NUM_SAMPLES)
    options = {**options, "allow_few": False, "allow_other_inception": False}
    plain = by_label(evaluate([root / "seed0"], root / "reference", **options))["1"].metrics
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


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this was run",))


def test_weights_that_cannot_be_used(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    pickled, wrong, cut = (tmp_path / name for name in ("pickled.pth", "wrong.pth", "cut.pth"))
    torch.save({"fc.weight": Malicious()}, pickled)
    torch.save({"fc.weight": torch.zeros(3)}, wrong)
    cut.write_bytes(options["inception"].read_bytes()[:100_000])
    for file in (pickled, wrong, cut):
        with pytest.raises(ValueError, match="does not hold the weights"):
            load_inception(file, allow_other=True)
    assert "this was run" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="no file of Inception weights"):
        evaluate([root / "seed0"], root / "reference", **{**options, "inception": tmp_path / "absent.pth"})
    with pytest.raises(ValueError, match="asks for a file called"):
        evaluation_features.load_cleanfid_inception(cut, allow_other=True)
    cut.rename(tmp_path / evaluation_features.CLEANFID_FILE)
    with pytest.raises(ValueError, match="not the published"):
        evaluation_features.load_cleanfid_inception(tmp_path / evaluation_features.CLEANFID_FILE)
    with pytest.raises(ValueError, match="does not hold clean-fid's"):
        evaluation_features.load_cleanfid_inception(tmp_path / evaluation_features.CLEANFID_FILE, allow_other=True)


def test_features_are_extracted_once(root: Path, inception: Inception, tmp_path: Path) -> None:
    images = open_images(folder_of(tmp_path / "images", random_images(5, 2)))
    calls = []

    def network(pixels: Tensor) -> tuple[Tensor, ...]:
        calls.append(len(pixels))
        return inception.network(pixels)

    counted = Inception(network, inception.sha256, published=False)
    first = inception_features(images, counted, batch_size=1, cache=tmp_path)
    again = inception_features(images, counted, cache=tmp_path)
    assert calls == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (file,) = tmp_path.glob("*.safetensors")
    assert images.sha256 in file.name
    assert inception.sha256[:16] in file.name
    inception_features(images, Inception(network, "0" * 64, published=False), cache=tmp_path)  # other weights
    assert len(calls) == 3
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        inception_features(images, counted, cache=tmp_path)
    broken = Inception(lambda x: (torch.full((len(x), 4), torch.nan), torch.zeros(len(x), 4)), "1" * 64, False)
    with pytest.raises(ValueError, match="not finite"):
        inception_features(images, broken, cache=tmp_path)


# --- images ---


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    order=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    compressed=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_arrays_are_read_image_by_image(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int, int], order: list[int], compressed: bool
) -> None:
    array = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    file = tmp_path_factory.mktemp("npz") / "samples.npz"
    (np.savez_compressed if compressed else np.savez)(file, array, mu=np.zeros(3))
    with patch.object(np, "load", side_effect=AssertionError("the whole array was read")):
        images = ImageArray(file)
        assert (len(images), images.size) == (shape[0], shape[1:])
        for index in [*range(len(images)), *(i % len(images) for i in order)]:
            assert torch.equal(images[index], torch.from_numpy(array[index]).permute(2, 0, 1))


def test_a_folder_and_its_array_have_the_same_features(
    root: Path, inception: Inception, extracted: tuple[Tensor, Tensor, Reference], tmp_path: Path
) -> None:
    files = ImageFiles(root / "seed0")
    np.savez(tmp_path / "samples.npz", torch.stack([files[i] for i in range(8)]).permute(0, 2, 3, 1).numpy())
    features, logits = inception_features(open_images(tmp_path / "samples.npz"), inception, cache=tmp_path)
    # Another batch size: convolutions may add up float32 in another order.
    torch.testing.assert_close(features, extracted[0][:8], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits, extracted[1][:8], rtol=1e-4, atol=1e-6)


def test_grey_images_and_halves_of_a_killed_run(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", random_images(6, 2)[:, :1])
    (tmp_path / "a" / ".000002-abc.png").write_bytes(b"half")
    (tmp_path / "a" / "run.json").write_text("{}")
    images = ImageFiles(tmp_path)
    assert len(images) == 2
    assert images[0].shape == (3, SIZE, SIZE)
    assert torch.equal(images[0][0], images[0][2])


def test_make_reference_crops_as_adm(tmp_path: Path, inception: Inception, weights: Path) -> None:
    for i, size in enumerate([(40, 70), (90, 33)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    meta = make_reference(
        str(tmp_path), tmp_path / "out.npz", inception=weights, image_size=32, keep_images=1, allow_other_inception=True
    )
    with np.load(tmp_path / "out.npz") as archive:
        assert archive["arr_0"].shape == (1, 32, 32, 3)
        assert int(archive["num_images"]) == meta["num_images"] == 2
    too_many: dict[str, Any] = {"inception": weights, "allow_other_inception": True, "keep_images": 3}
    with pytest.raises(ValueError, match="2 images"):
        make_reference(str(tmp_path), tmp_path / "more.npz", **too_many)
    with pytest.raises(ValueError, match=r"\.npz"):
        make_reference(str(tmp_path), tmp_path / "out.json", inception=weights)
    assert not list(tmp_path.glob("more*"))


# --- bad input ---


def statistics_file(file: Path, num_features: int = NUM_FEATURES, **changes: Any) -> Path:
    arrays = {"mu": np.zeros(num_features), "sigma": np.eye(num_features)}
    np.savez(file, **{**arrays, **changes})
    return file


def mixed_sizes(path: Path) -> Path:
    folder_of(path, random_images(7, 2))
    Image.new("RGB", (16, 16)).save(path / "grid.png")
    return path


def not_an_image(path: Path) -> Path:
    folder_of(path, random_images(7, 2))
    (path / "notes.png").write_text("not an image")
    return path


def cut_png(path: Path) -> Path:
    folder_of(path, random_images(7, 2))
    file = path / "000001.png"
    file.write_bytes(file.read_bytes()[:200])
    return path


def only_text(path: Path) -> Path:
    path.mkdir()
    (path / "readme.txt").write_text("no images")
    return path


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def array_file(path: Path, array: np.ndarray) -> Path:
    np.savez(path.with_suffix(".npz"), array)
    return path.with_suffix(".npz")


def cut_file(path: Path) -> Path:
    file = array_file(path, np.zeros((4, 8, 8, 3), np.uint8))
    file.write_bytes(file.read_bytes()[:-100])
    return file


def damaged_file(path: Path) -> Path:
    """Change a pixel, so that the archive's checksum is wrong."""
    file = array_file(path, np.zeros((2, SIZE, SIZE, 3), np.uint8))
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo("arr_0.npy").header_offset
    content = bytearray(file.read_bytes())
    content[start + 1000] = 1
    file.write_bytes(content)
    return file


def one_image(path: Path) -> Path:
    return folder_of(path, random_images(8, 1))


BAD_SAMPLES = [
    (lambda p: p / "absent", "neither a folder"),
    (empty, "no images.*nothing"),
    (only_text, r"no images.*readme\.txt"),
    (mixed_sizes, r"different sizes.*000000\.png is 32 x 32; grid\.png is 16 x 16"),
    (not_an_image, r"notes\.png is no image"),
    (cut_png, r"000001\.png is no image, or cut off"),
    (one_image, "holds 1 image"),
    (lambda p: array_file(p, np.zeros((4, 8, 8, 3), np.float32)), "uint8.*not float32"),
    (lambda p: array_file(p, np.zeros((4, 3, 8, 8), np.uint8)), r"uint8 \[N, H, W, 3\], not uint8 \[4, 3, 8, 8\]"),
    (lambda p: array_file(p, np.zeros((0, 8, 8, 3), np.uint8)), "uint8"),
    (lambda p: statistics_file(p.with_suffix(".npz")), "no images.*arr_0.*mu"),
    (cut_file, "cut off"),
    (damaged_file, "damaged"),
]


@pytest.mark.parametrize(("make", "message"), BAD_SAMPLES)
def test_bad_samples(make: Callable[[Path], Path], message: str, tmp_path: Path, inception: Inception) -> None:
    samples = make(tmp_path / "samples")
    with pytest.raises(ValueError, match=message) as caught:
        inception_features(evaluation.open_samples([samples], allow_few=True)[0], inception, cache=tmp_path)
    assert str(samples) in str(caught.value)
    assert "\n" not in str(caught.value)


def cut_statistics(path: Path) -> Path:
    statistics_file(path)
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def plain_array(path: Path) -> Path:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    return path


def text_file(path: Path) -> Path:
    path.write_text("mu, sigma")
    return path


def objects(path: Path) -> Path:
    return statistics_file(path, mu=np.array([Malicious()] * NUM_FEATURES, dtype=object))


NAN = np.full(NUM_FEATURES, np.nan)
BAD_REFERENCES = [
    (lambda p: statistics_file(p, 768), r"another feature size.*768.*2048"),
    (lambda p: statistics_file(p, sigma=np.ones(NUM_FEATURES)), "another feature size"),
    (lambda p: statistics_file(p, mu=NAN), "not finite"),
    (lambda p: statistics_file(p, sigma=np.diag(NAN)), "not finite"),
    (lambda p: statistics_file(p, mu=np.zeros(NUM_FEATURES, int)), "not floating point"),
    (lambda p: statistics_file(p, meta=json.dumps({"inception_sha256": "f" * 64})), "made with Inception weights"),
    (cut_statistics, "cut off"),
    (objects, r"no \.npz file of statistics"),
    (plain_array, r"no \.npz file of statistics"),
    (text_file, r"no \.npz file of statistics"),
    (lambda p: p, "neither a folder"),
]


@pytest.mark.parametrize(("make", "message"), BAD_REFERENCES)
def test_bad_references(
    make: Callable[[Path], Path],
    message: str,
    inception: Inception,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = make(tmp_path / "reference.npz")
    with pytest.raises(ValueError, match=message) as caught:
        load_reference(reference, inception)
    assert str(reference) in str(caught.value)
    assert "this was run" not in capsys.readouterr().out


def test_sets_that_do_not_go_together(root: Path, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"18 images.*reference 20"):
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


# --- the commands ---


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tokenbridge", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_commands(
    root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ("--inception", weights, "--allow-other-inception")
    source, statistics = root / "more-images", tmp_path / "statistics.npz"
    folder_of(source, random_images(10, 3))
    assert run_command(monkeypatch, "reference", source, "--out", statistics, "--image-size", SIZE, *other) == 0
    assert "Statistics of 3 images" in capsys.readouterr().out

    out = tmp_path / "results.json"
    common = ("evaluate", root / "seed0", "--reference", statistics, *other, "--cache", root / "features")
    assert run_command(monkeypatch, *common) == 2  # too few
    assert "--allow-few" in capsys.readouterr().err
    assert run_command(monkeypatch, *common, "--allow-few", "--num-bootstrap", 2, "--out", out) == 0
    printed = capsys.readouterr().out
    assert f"FID{LABEL}" in printed
    assert "precision, recall, KID: not run:" in printed
    assert "biased" in printed
    stored = results.read(out)
    assert stored.rows[0].metrics["FID" + LABEL] > 0
    assert stored.provenance.data_sha256.keys() == {str(root / "seed0"), str(statistics)}
    assert stored.provenance.command.startswith("tokenbridge evaluate")
    assert "FID" in markdown.to_markdown(stored, None)

    assert run_command(monkeypatch, *common, "--allow-few", "--num-bootstrap", 0, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["metrics"]["images"] == NUM_SAMPLES


def test_the_command_names_missing_weights(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert run_command(monkeypatch, "evaluate", root / "seed0", "--reference", root / "reference") == 2
    assert "weights-inception-2015-12-05-6726825d.pth" in capsys.readouterr().err
