"""Reference statistics: made, read, and refused."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from scored_images import array_file, statistics_file

from tokenbridge.evaluation import reference as reference_module
from tokenbridge.evaluation.inception import NUM_FEATURES, Inception
from tokenbridge.evaluation.reference import load_reference, make_reference, read_statistics
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import sha256_of

if TYPE_CHECKING:
    from collections.abc import Callable

pytest_plugins = ("scored_images",)


def test_make_reference_crops_as_adm(tmp_path: Path, inception: Inception) -> None:
    for i, size in enumerate([(40, 70), (90, 33)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    meta = make_reference(str(tmp_path), tmp_path / "out.npz", inception=inception, image_size=32, keep_images=1)
    with np.load(tmp_path / "out.npz") as archive:
        assert archive["arr_0"].shape == (1, 32, 32, 3)
        assert int(archive["num_images"]) == meta["num_images"] == 2
    with pytest.raises(ValueError, match="2 images"):
        make_reference(str(tmp_path), tmp_path / "more.npz", inception=inception, keep_images=3)
    with pytest.raises(ValueError, match=r"\.npz"):
        make_reference(str(tmp_path), tmp_path / "out.json", inception=inception)
    assert not list(tmp_path.glob("more*"))


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


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this was run",))


def objects(path: Path) -> Path:
    return statistics_file(path, mu=np.array([Malicious()] * NUM_FEATURES, dtype=object))


def ours(**changes: Any) -> str:
    meta = {"format": "tokenbridge-reference/1", "num_images": 9, "inception_sha256": "0" * 64}
    return json.dumps({**meta, **changes})


def bomb(path: Path) -> Path:
    """Write statistics whose mean unfolds to far more than it claims."""
    content = io.BytesIO()
    np.save(content, np.zeros(NUM_FEATURES))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", content.getvalue() + bytes(10**7))
        content.seek(0)
        np.save(content, np.eye(NUM_FEATURES))
        archive.writestr("sigma.npy", content.getvalue())
    return path


NAN = np.full(NUM_FEATURES, np.nan)


def changed(place: tuple[int, int], value: float) -> np.ndarray:
    covariance = np.eye(NUM_FEATURES)
    covariance[place] = value
    return covariance


BAD_REFERENCES = [
    (lambda p: statistics_file(p, 768), r"another feature size.*768.*2048"),
    (lambda p: statistics_file(p, sigma=np.ones(NUM_FEATURES)), "another feature size"),
    (lambda p: statistics_file(p, mu=NAN), "not finite"),
    (lambda p: statistics_file(p, sigma=np.diag(NAN)), "not finite"),
    (lambda p: statistics_file(p, mu=np.zeros(NUM_FEATURES, int)), "not floating point"),
    (lambda p: statistics_file(p, meta=json.dumps({"inception_sha256": "f" * 64})), "made with Inception weights"),
    (lambda p: statistics_file(p, sigma=changed((3, 4), 0.5)), "sigma of .* is not symmetric"),
    (lambda p: statistics_file(p, sigma=changed((3, 3), -0.5)), "sigma of .* has negative eigenvalues"),
    (lambda p: statistics_file(p, sigma=np.eye(NUM_FEATURES) * 1e200), r"values up to 1e\+200, which no features have"),
    (lambda p: statistics_file(p, meta=ours(num_images=float("nan"))), "meta of .* has no usable num_images"),
    (lambda p: statistics_file(p, meta=ours(num_images=-5)), "meta of .* has no usable num_images"),
    (lambda p: statistics_file(p, meta=ours(inception_sha256=7)), "meta of .* has no usable inception_sha256"),
    (bomb, r"mu of .* is float64 \[2048\], but .* bytes of values are there"),
    (cut_statistics, r"cannot be read as an \.npz file of statistics"),
    (objects, "mu of .* holds objects, which would be code"),
    (plain_array, r"cannot be read as an \.npz file of statistics"),
    (text_file, r"cannot be read as an \.npz file of statistics"),
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *BAD_REFERENCES[:5],
        *BAD_REFERENCES[6:-1],
        (lambda p: array_file(p, np.zeros((2, 8, 8, 3), np.uint8)), r"no statistics \(mu and sigma\).*arr_0"),
        (lambda p: p, "There is no file"),
    ],
)
def test_bad_statistics(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    """Where statistics are asked for, images do not stand in for them."""
    file = make(tmp_path / "statistics.npz")
    with pytest.raises(ValueError, match=message) as caught:
        read_statistics(file)
    assert str(file) in str(caught.value)


def test_statistics_beside_images_are_read(tmp_path: Path) -> None:
    mean = np.linspace(0, 1, NUM_FEATURES, dtype=np.float32)
    file = statistics_file(tmp_path / "adm.npz", mu=mean, arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    read = read_statistics(file)
    assert read.mean.dtype == read.covariance.dtype == np.float64
    np.testing.assert_array_equal(read.mean, mean)
    np.testing.assert_array_equal(read.covariance, np.eye(NUM_FEATURES))


@pytest.mark.parametrize(
    "meta",
    [
        "made by hand",
        json.dumps([1, 2]),
        json.dumps({"num_images": "50k"}),
        np.array({"by": "me"}, object),
        "[" * 9999,
        7,
    ],
)
def test_what_others_say_of_their_statistics_is_ignored(meta: Any, inception: Inception, tmp_path: Path) -> None:
    reference = load_reference(statistics_file(tmp_path / "theirs.npz", meta=meta), inception)
    assert reference.num_images is None
    np.testing.assert_array_equal(reference.statistics.covariance, np.eye(NUM_FEATURES))


def test_covariances_with_rounding_are_taken(tmp_path: Path) -> None:
    """Of fewer images than features, in float32 as ADM stores them: rank-deficient, not quite symmetric."""
    features = np.random.default_rng(0).gamma(1.0, 0.4, (60, NUM_FEATURES))
    covariance = np.cov(features, rowvar=False).astype(np.float32)
    covariance += np.random.default_rng(1).normal(0, 1e-7, covariance.shape).astype(np.float32)
    read = read_statistics(statistics_file(tmp_path / "few.npz", sigma=covariance))
    np.testing.assert_array_equal(read.covariance, covariance)


def test_a_reference_that_is_replaced_while_it_is_read_is_refused(
    tmp_path: Path, inception: Inception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistics of one file never get the hash of another."""
    path, other = statistics_file(tmp_path / "a.npz"), statistics_file(tmp_path / "b.npz")

    def replacing(file: Path) -> str:
        other.replace(path)
        return sha256_of(file)

    monkeypatch.setattr(reference_module, "sha256_of", replacing)
    with pytest.raises(UserError, match="was changed while it was read"):
        load_reference(path, inception, cache=tmp_path)
