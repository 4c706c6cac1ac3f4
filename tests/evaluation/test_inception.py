"""Inception's weights: the published ones, others, and files that are neither."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from official_files import Malicious as MakesFolder

from tokenbridge.evaluation import inception as inception_module
from tokenbridge.evaluation.inception import (
    CLEANFID_FILE,
    NUM_FEATURES,
    NUM_LOGITS,
    find_inception,
    load_cleanfid_inception,
    load_inception,
    write_random_inception,
)
from tokenbridge.utils.devices import best_device
from tokenbridge.utils.files import sha256_of
from tokenbridge.weights.artifacts import ARTIFACTS, INCEPTION

pytest_plugins = ("scored_images",)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this was run",))


def test_weights_that_cannot_be_used(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickled, wrong, cut = (tmp_path / name for name in ("pickled.pth", "wrong.pth", "cut.pth"))
    torch.save({"fc.weight": Malicious()}, pickled)
    torch.save({"fc.weight": torch.zeros(3)}, wrong)
    cut.write_bytes(weights.read_bytes()[:100_000])
    for file in (pickled, wrong, cut):
        with pytest.raises(ValueError, match="does not hold the weights"):
            load_inception(file, allow_other=True)
    assert "this was run" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="no file of Inception weights"):
        load_inception(tmp_path / "absent.pth")


class Writer(torch.nn.Module):
    """A TorchScript program that writes a file when it is asked for features."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        torch.save(x, self.path)
        return x


def test_cleanfids_file_is_a_program_and_only_the_published_one_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / CLEANFID_FILE
    torch.jit.script(Writer(str(tmp_path / "written"))).save(str(file))

    def run(*_: Any, **__: Any) -> None:
        pytest.fail("the program was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(torch.jit, "load", run)
        with pytest.raises(ValueError, match="another one is never run"):
            load_cleanfid_inception(file)
    with pytest.raises(ValueError, match="no file of Inception weights"):
        load_cleanfid_inception(tmp_path / "absent.pt")
    # A damaged file of the right hash is one sentence.
    file.write_bytes(file.read_bytes()[:1000])
    monkeypatch.setattr(inception_module, "CLEANFID_SHA256", sha256_of(file))
    with pytest.raises(ValueError, match="cannot be read as clean-fid's Inception"):
        load_cleanfid_inception(file)


def test_other_inception_weights_are_marked_as_such(tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    write_random_inception(file)
    inception = load_inception(file, allow_other=True)
    assert not inception.published
    assert inception.extractor == "other-inception"
    features, logits = inception.network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=best_device()))
    assert (features.shape, logits.shape) == ((2, NUM_FEATURES), (2, NUM_LOGITS))
    assert features.isfinite().all()
    assert features.std() > 0.01
    with pytest.raises(ValueError, match="not the published inception"):
        find_inception(file)
    with pytest.raises(ValueError, match="not the published weights-inception"):
        load_inception(file)


def test_published_weights_have_no_label(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = replace(ARTIFACTS[INCEPTION], sha256=sha256_of(weights), size=None)
    monkeypatch.setitem(ARTIFACTS, INCEPTION, declared)
    inception = load_inception(find_inception(weights), allow_other=True)
    assert inception.published
    assert inception.extractor is None


def test_random_inception_follows_its_seed(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        write_random_inception(file, seed)
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (torch.load(file, weights_only=True)["fc.weight"] for file in files)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_other_inception_weights_never_run_code(tmp_path: Path) -> None:
    file = tmp_path / "bad.pth"
    torch.save({"fc.weight": MakesFolder(tmp_path / "executed")}, file)
    with pytest.raises(ValueError, match="does not hold the weights of torch-fidelity's Inception"):
        load_inception(file, allow_other=True)
    assert not (tmp_path / "executed").exists()
    torch.save({"fc.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="does not hold the weights of torch-fidelity's Inception"):
        load_inception(file, allow_other=True)
