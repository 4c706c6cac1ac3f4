"""What a later call in the folder of a run may change, and what a present image is.

Shape letters: N images of the run.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from samplers import Flat

from tokenbridge.sampling.config import RunConfig
from tokenbridge.sampling.run import RunReport, sampling_run
from tokenbridge.utils import provenance
from tokenbridge.utils.errors import UserError

SMALL = RunConfig(6, labels="random", batch_size=4)


def quiet(sampler: Flat, config: RunConfig, folder: Path, **options: Any) -> RunReport:
    return sampling_run(sampler, config, folder, show_progress=False, **options)


def pixels_of(report: RunReport) -> Any:
    """Return the images [N, H, W, 3] of a run."""
    if report.samples.suffix == ".npz":
        with np.load(report.samples) as file:
            return file["arr_0"]
    paths = sorted(report.samples.iterdir())
    assert [path.name for path in paths] == [f"{i:06d}.png" for i in range(len(paths))]
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


def record_of(folder: Path) -> Any:
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("file_format", ["png", "npz"])
@pytest.mark.parametrize("done", [4, 6])
def test_a_run_grows_and_changes_its_batches(tmp_path: Path, file_format: Any, done: int) -> None:
    small = replace(SMALL, format=file_format)
    quiet(Flat(), small, tmp_path / "run")
    if done < 6 and file_format == "png":  # an unfinished run grows too
        for i in range(done, 6):
            (tmp_path / "run" / "images" / f"{i:06d}.png").unlink()
    grown = replace(small, num_images=15, batch_size=7)
    report = quiet(Flat(), grown, tmp_path / "run")
    assert report.num_made == 15 - (done if file_format == "png" else 6)
    assert np.array_equal(pixels_of(report), pixels_of(quiet(Flat(), grown, tmp_path / "fresh")))
    (entry,) = record_of(tmp_path / "run")["continued"]
    assert entry["changes"] == ["num_images was 6 and is now 15", "batch_size was 4 and is now 7"]
    assert report.changes == tuple(entry["changes"])
    assert entry["images before"] == [[0, 15 - report.num_made - 1]]
    assert record_of(tmp_path / "run")["recipe"]["num_images"] == 15
    again = quiet(Flat(), grown, tmp_path / "run")
    assert (again.num_made, again.changes) == (0, report.changes)
    if file_format == "npz":
        with np.load(report.samples) as ours, np.load(tmp_path / "fresh" / "samples.npz") as theirs:
            assert np.array_equal(ours["arr_1"], theirs["arr_1"])
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json", "samples.npz"]


@settings(max_examples=60, deadline=None)
@given(
    first=st.tuples(st.integers(1, 9), st.sampled_from(["random", "balanced", 1]), st.integers(1, 4)),
    change=st.sampled_from(
        [("num_images", n) for n in (1, 3, 8, 12)]
        + [("batch_size", n) for n in (1, 3, 5)]
        + [("seed", 1), ("randomness", "official"), ("format", "npz"), ("salt", 2), ("labels", "random"), ("labels", 2)]
        + [("labels", 1), ("labels", "balanced"), ("channels", 3), ("name", "round"), ("torch", "9"), ("code", "x")]
    ),
    randomness=st.sampled_from(["per-image", "official"]),
    kept=st.sets(st.integers(0, 8)),
)
def test_any_single_change_is_refused_by_its_name_or_leaves_the_images_equal(
    first: tuple[int, Any, int], change: tuple[str, Any], randomness: Any, kept: set[int]
) -> None:
    """The images after the change are those that the changed call alone would have made."""
    (num_images, labels, batch_size), (name, value) = first, change

    def config_of(num_images: int, labels: Any, **options: Any) -> RunConfig:
        each = (labels,) * num_images if isinstance(labels, int) else None if labels == "balanced" else labels
        return RunConfig(num_images, labels=each, **options)

    options: dict[str, Any] = {"num_images": num_images, "labels": labels, "batch_size": batch_size}
    options["randomness"] = randomness
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        folder = Path(place)
        quiet(Flat(), config_of(**options), folder / "run")
        for i in set(range(num_images)) - kept:  # as if it had been killed
            (folder / "run" / "images" / f"{i:06d}.png").unlink()
        sampler = replace(Flat(), **{name: value}) if name in ("salt", "channels", "name") else Flat()
        if name == "torch":
            patch.setattr(provenance, "versions", lambda real=provenance.versions: {**real(), "torch": value})
        elif name == "code":
            patch.setattr(provenance, "code_sha256", lambda: value)
        elif name not in ("salt", "channels", "name"):
            options[name] = value
        try:
            report = quiet(sampler, config_of(**options), folder / "run")
        except UserError as error:
            names = {"code": "made_with.tokenbridge", "torch": "made_with.torch", "channels": "num_images"}
            words = (names.get(name, name), "the label of image", "Move it away", "num_processes")
            assert any(word in str(error) for word in words)  # noqa: PT017  it may or may not be refused
            return
        assert name not in ("torch", "code", "salt", "name", "seed", "format")
        assert np.array_equal(pixels_of(report), pixels_of(quiet(sampler, config_of(**options), folder / "fresh")))


def test_a_label_that_is_another_is_named(tmp_path: Path) -> None:
    quiet(Flat(), RunConfig(4, labels=(3, 3, 3, 3)), tmp_path)
    with pytest.raises(UserError, match="the label of image 2 was 3 and is now 1"):
        quiet(Flat(), RunConfig(5, labels=(3, 3, 1, 3, 3)), tmp_path)
    assert quiet(Flat(), RunConfig(5, labels=(3, 3, 3, 3, 1)), tmp_path).num_made == 1


@pytest.mark.parametrize(
    ("what", "words"),
    [("code", 'made_with.tokenbridge was "'), ("torch", 'is now "9.9"'), ("diffusers", "made_with.diffusers was")],
)
def test_other_code_goes_on_only_if_it_is_accepted_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, words: str
) -> None:
    samples = quiet(Flat(), SMALL, tmp_path).samples
    (samples / "000002.png").unlink()
    if what == "code":
        monkeypatch.setattr(provenance, "code_sha256", lambda: "0123")
    else:
        real = provenance.versions()
        monkeypatch.setattr(provenance, "versions", lambda: {**real, what: "9.9"})
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(UserError, match="other code or libraries") as error:
        quiet(Flat(), SMALL, tmp_path)
    assert words in str(error.value)
    assert "--accept-other-code" in str(error.value)
    assert (tmp_path / "run.json").read_bytes() == before
    report = quiet(Flat(), SMALL, tmp_path, accept_other_code=True)
    assert report.num_made == 1
    (entry,) = record_of(tmp_path)["continued"]
    assert words in entry["changes"][0]
    assert entry["images before"] == [[0, 1], [3, 5]]
    assert quiet(Flat(), SMALL, tmp_path).num_made == 0  # accepted once and for all


def test_accepting_other_code_accepts_nothing_else(tmp_path: Path) -> None:
    quiet(Flat(), SMALL, tmp_path)
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        quiet(Flat(), replace(SMALL, seed=1), tmp_path, accept_other_code=True)


# ------------------------------------------------------------------------------------------ what is present


def png(mode: str, size: tuple[int, int]) -> Any:
    def write(path: Path) -> None:
        Image.new(mode, size, 9 if mode == "L" else None).save(path, format="PNG")

    return write


DAMAGES: dict[str, Any] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "short": lambda path: path.write_bytes(path.read_bytes()[:9]),
    "text": lambda path: path.write_text("not an image"),
    "bit": lambda path: path.write_bytes(path.read_bytes()[:45] + b"\xff" + path.read_bytes()[46:]),
    "size": png("L", (5, 4)),
    "mode": png("RGB", (4, 4)),
    "jpeg": lambda path: Image.new("L", (4, 4)).save(path, format="JPEG"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_image_is_made_anew(tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    samples = quiet(Flat(), SMALL, tmp_path).samples
    before = {path.name: path.read_bytes() for path in samples.iterdir()}
    for i in (1, 4):
        DAMAGES[damage](samples / f"{i:06d}.png")
    assert quiet(Flat(), SMALL, tmp_path).num_made == 2
    assert f"2 files are damaged in {tmp_path}, and the images are made anew." in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in samples.iterdir()} == before


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "shape", "type"])
def test_a_damaged_part_is_made_anew(tmp_path: Path, damage: str) -> None:
    config = replace(SMALL, format="npz", batch_size=2)
    whole = pixels_of(quiet(Flat(), config, tmp_path / "whole"))
    with pytest.raises(FloatingPointError):
        quiet(replace(Flat(), bad=(5,)), config, tmp_path / "run")
    part = tmp_path / "run" / "parts" / "000002-000004.npy"
    if damage in DAMAGES:
        DAMAGES[damage](part)
    else:
        shape, kind = ((2, 4, 5, 3), np.uint8) if damage == "shape" else ((2, 4, 4, 3), np.float32)
        np.save(part, np.zeros(shape, kind))
    (part.parent / "notes.txt").write_text("mine")
    report = quiet(Flat(), config, tmp_path / "run")
    assert report.num_made == 4
    assert np.array_equal(pixels_of(report), whole)
    assert (part.parent / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "bit"])
def test_a_damaged_npz_is_made_anew(tmp_path: Path, damage: str) -> None:
    config = replace(SMALL, format="npz")
    samples = quiet(Flat(), config, tmp_path).samples
    before = pixels_of(quiet(Flat(), config, tmp_path))
    if damage == "bit":
        content = bytearray(samples.read_bytes())
        content[200] ^= 1
        samples.write_bytes(bytes(content))
    else:
        DAMAGES[damage](samples)
    report = quiet(Flat(), config, tmp_path)
    assert report.num_made == 6
    assert np.array_equal(pixels_of(report), before)


@pytest.mark.parametrize("name", ["000006.png", "0000001.png", "cat.png", "000001.PNG", "1.jpg", "000002.webp"])
def test_an_image_of_somebody_else_is_named_and_stays(tmp_path: Path, name: str) -> None:
    samples = quiet(Flat(), SMALL, tmp_path).samples
    (samples / name).write_bytes(b"mine")
    (samples / "000003.png").unlink()
    for options in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match=f"{samples} holds {name}, which is not one of the 6 images"):
            quiet(Flat(), SMALL, tmp_path, **options)
    assert (samples / name).read_bytes() == b"mine"
    assert len(list(samples.iterdir())) == 6


def test_damaged_streams_are_drawn_from_their_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = replace(SMALL, labels=None, randomness="official", batch_size=2)
    whole = pixels_of(quiet(Flat(), config, tmp_path / "whole"))
    for content in (b"", b"PK\x03\x04", (tmp_path / "whole" / "streams-0000.pt").read_bytes()[:-200]):
        with pytest.raises(FloatingPointError):
            quiet(replace(Flat(), bad=(5,)), config, tmp_path / "run", overwrite=True)
        (tmp_path / "run" / "streams-0000.pt").write_bytes(content)
        assert np.array_equal(pixels_of(quiet(Flat(), config, tmp_path / "run")), whole)
        assert "is damaged; the random numbers are drawn from their start" in capfd.readouterr().err


DAMAGED_RECIPES = [
    *(b"", b"{", b"[]", b"null", b"3", b'"text"', b"{}", b"NaN", b"\xff\xfe", b"[" * 10**5, b"9" * 5000),
    *(b'{"recipe": 1}', b'{"recipe": {}}', b'{"recipe": [1, 2]}', b'{"recipe": {"sampler": 1, "num_images": 6}}'),
    b'{"recipe": {"sampler": {}, "num_images": "6"}}',
    b'{"recipe": {"sampler": {}, "num_images": 6}, "continued": 3}',
]


@pytest.mark.parametrize("content", DAMAGED_RECIPES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_recipe_is_one_sentence(tmp_path: Path, content: bytes, overwrite: bool) -> None:
    samples = quiet(Flat(), SMALL, tmp_path).samples
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run.json is damaged or is not the recipe of a run"):
        quiet(Flat(), SMALL, tmp_path, overwrite=overwrite)
    assert (tmp_path / "run.json").read_bytes() == content
    assert len(list(samples.iterdir())) == 6


# ------------------------------------------------------------------------------------------------ overwrite


@pytest.mark.parametrize("before", ["png", "npz"])
def test_overwrite_starts_anew_and_removes_what_the_run_made(tmp_path: Path, before: Any) -> None:
    old = replace(SMALL, num_images=9, seed=3, format=before, randomness="official")
    quiet(Flat(), old, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    report = quiet(Flat(), SMALL, tmp_path, overwrite=True)
    assert report.num_made == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "notes.txt", "run.json"]
    assert "continued" not in record_of(tmp_path)
    assert np.array_equal(pixels_of(report), pixels_of(quiet(Flat(), SMALL, tmp_path / "fresh")))


@pytest.mark.parametrize("name", ["samples.npz", "no-result.npz", "parts/000000-000003.npy", "no-result/000000.png"])
def test_overwrite_leaves_what_the_run_did_not_make(tmp_path: Path, name: str) -> None:
    """A user may have packed the images of a run into an .npz beside them: names of the other format are not ours."""
    quiet(Flat(), SMALL, tmp_path)
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_bytes(b"mine")
    assert quiet(Flat(), replace(SMALL, seed=1), tmp_path, overwrite=True).num_made == 6
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("strange", ["gif", None, 3, ["png"]])
def test_overwrite_refuses_the_recipe_of_an_unknown_format(tmp_path: Path, strange: Any) -> None:
    quiet(Flat(), SMALL, tmp_path)
    content = json.loads((tmp_path / "run.json").read_bytes())
    content["recipe"]["format"] = strange
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="Unknown format"):
        quiet(Flat(), SMALL, tmp_path, overwrite=True)
    assert len(list((tmp_path / "images").iterdir())) == 6


def test_overwrite_leaves_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000000.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds no run"):
        quiet(Flat(), SMALL, tmp_path, overwrite=True)
    assert (tmp_path / "images" / "000000.png").read_bytes() == b"mine"
