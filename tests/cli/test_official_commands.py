"""The commands on official numbers and files: `tokenbridge conformance` and `tokenbridge convert`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDENS, Run, error_of, tiny_model
from diffusers import AutoencoderKL
from official_files import Malicious, declare_small_models, official_state, small_vae, write_checkpoint, write_kl16
from safetensors.torch import save_file

from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.sampling.pipeline import TokenBridgePipeline

QUANTIZER = GOLDENS / "tokenbridge-quantizer-8.npz"  # runs in no time


def write_failing(path: Path) -> Path:
    """Write a golden file in which one expected value is off."""
    with np.load(QUANTIZER) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["out.dequantized"].flat[0] += 0.5
    np.savez(path, **arrays)
    return path


# -------------------------------------------------------------------------------------------- conformance


def test_conformance_passes(run_command: Run) -> None:
    code, out, err = run_command("conformance", QUANTIZER, GOLDENS / "kl16-vae.npz")
    assert code == 0
    assert "2 of 2 files pass." in out
    assert "tokenbridge-quantizer-8.npz" in out
    assert [line for line in err.splitlines() if line.startswith("conformance: ")] == [
        f"conformance: {QUANTIZER}",
        f"conformance: {GOLDENS / 'kl16-vae.npz'}",
    ]


def test_conformance_as_json(run_command: Run, tmp_path: Path) -> None:
    """Everything on stdout is one JSON document; the exit code is the verdict of the worst file."""
    code, out, _ = run_command("conformance", "--json", QUANTIZER)
    assert (code, json.loads(out)["passed"]) == (0, True)
    bad = write_failing(tmp_path / "bad.npz")
    code, out, _ = run_command("conformance", QUANTIZER, bad, "--json")
    report = json.loads(out)
    assert (code, report["passed"]) == (1, False)
    assert [(file["path"], file["passed"]) for file in report["files"]] == [(str(QUANTIZER), True), (str(bad), False)]
    outcomes = {outcome["name"]: outcome for outcome in report["files"][1]["outcomes"]}
    assert {name for name, outcome in outcomes.items() if outcome["verdict"] == "fail"} == {"dequantized"}
    assert outcomes["dequantized"]["error"] == pytest.approx(0.5, abs=1e-5)
    assert "1 of" in outcomes["dequantized"]["reason"]


def test_conformance_fails_with_the_output_and_the_reason(run_command: Run, tmp_path: Path) -> None:
    bad = write_failing(tmp_path / "bad.npz")
    code, out, _ = run_command("conformance", tmp_path)  # a folder stands for its files
    assert code == 1
    assert f"{bad}, dequantized: fail: 1 of" in out
    assert "0 of 1 files pass." in out


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged or not an .npz file"),
        (b"tensors as text", "damaged or not an .npz file"),
        ("cut", "damaged or not an .npz file"),
        ("other", "The file has no 'meta'."),
    ],
)
def test_conformance_on_files_that_cannot_be_run(
    run_command: Run, tmp_path: Path, content: bytes | str, reason: str
) -> None:
    """A failure with its reason and exit code 1, never a skip; the files after it are run."""
    path = tmp_path / "golden.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        path.write_bytes(QUANTIZER.read_bytes()[:-100])
    elif content == "other":
        np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    code, out, err = run_command("conformance", path, QUANTIZER)
    assert code == 1
    assert f"{path}, file: fail: " in out
    assert reason in out
    assert "1 of 2 files pass." in out
    assert "Traceback" not in err


def test_conformance_never_runs_pickled_code(run_command: Run, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "golden.npz"
    with np.load(QUANTIZER) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["in.x"] = np.array([Malicious(mark)], dtype=object)
    np.savez(path, **arrays)
    code, out, _ = run_command("conformance", path)
    assert code == 1
    assert "Object arrays cannot be loaded" in out
    assert not mark.exists()
    with np.load(path, allow_pickle=True) as file:  # the control: it would have run
        assert file["in.x"].shape == (1,)
    assert mark.exists()


def test_conformance_on_an_empty_folder_or_nothing(run_command: Run, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.npz"):
        code, out, err = run_command("conformance", path, QUANTIZER)
        assert (code, out) == (2, "")
        assert "There " in err
    code, out, err = run_command("conformance")
    assert (code, out) == (2, "")
    assert "Missing argument" in err


# ------------------------------------------------------------------------------------------------ convert


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> str:
    return declare_small_models(monkeypatch)


def test_convert_takes_the_moving_average_unless_told(run_command: Run, tmp_path: Path, preset: str) -> None:
    """In the file of these tests, the last weights are the averaged ones plus 1."""
    path, expected = write_checkpoint(tmp_path / "checkpoint-last.pth"), dict(tiny_model().named_parameters())
    for options, offset in (([], 0), (["--ema"], 0), (["--no-ema"], 1)):
        if (tmp_path / "model").exists():
            message = error_of(run_command("convert", path, preset, "--out", tmp_path / "model", *options))
            assert "already holds a converted model" in message
        code, out, _ = run_command("convert", path, preset, "--out", tmp_path / "model", "--overwrite", *options)
        assert (code, out) == (0, f"{preset} is in {tmp_path / 'model'}/\n")
        loaded = dict(TokenBridge.from_pretrained(tmp_path / "model").named_parameters())
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name] + offset) for name in expected)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-last.pth", "model"]


def test_convert_takes_a_folder_and_the_vae(run_command: Run, tmp_path: Path, preset: str) -> None:
    (tmp_path / "official").mkdir()
    write_checkpoint(tmp_path / "official" / "checkpoint-last.pth")
    assert run_command("convert", tmp_path / "official", preset, "--out", tmp_path / "model")[0] == 0
    vae = write_kl16(tmp_path / "kl16.ckpt")
    assert run_command("convert", vae, "kl16", "--out", tmp_path / "vae")[0] == 0
    loaded, expected = AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict(), small_vae().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_convert_writes_a_whole_pipeline(run_command: Run, tmp_path: Path, preset: str) -> None:
    path, vae = write_checkpoint(tmp_path / "checkpoint.pth"), write_kl16(tmp_path / "kl16.ckpt")
    code, _, _ = run_command("convert", path, preset, "--vae", vae, "--out", tmp_path / "folder", "--no-ema")
    assert code == 0
    pipeline = TokenBridgePipeline.from_pretrained(tmp_path / "folder")
    mask_token = tiny_model().backbone.mask_token
    assert torch.equal(pipeline.transformer.backbone.mask_token, mask_token + 1)
    assert len(pipeline([0, 1], seed=3).images) == 2


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, weight=np.zeros(3))


def _empty_zip(path: Path) -> None:
    path.write_bytes(b"PK\x05\x06" + bytes(18))


def _lacking(path: Path) -> None:
    write_checkpoint(path, model_ema={k: v for k, v in official_state(tiny_model()).items() if k != "mask_token"})


def _left_over(path: Path) -> None:
    write_checkpoint(path, model_ema={**official_state(tiny_model()), "diffloss.net.weight": torch.zeros(3)})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (Path.unlink, "There is no checkpoint at {path}."),
        (_cut, "{path} ({size} bytes) is truncated, damaged or not a checkpoint of torch."),
        (_npz, "{path} ({size} bytes) is truncated, damaged or not a checkpoint of torch."),
        (_empty_zip, "{path} (22 bytes) is truncated, damaged or not a checkpoint of torch."),
        (lambda path: path.write_text("<html>404</html>"), "{path} (16 bytes) is truncated, damaged or not a"),
        (lambda path: save_file({"a": torch.zeros(3)}, path), "{path} ({size} bytes) is truncated, damaged or no"),
        (lambda path: write_kl16(path), "{path} holds no weights under 'model_ema'; it has keys ['model']."),
        (lambda path: write_checkpoint(path, model_ema=None), "{path} holds no weights under 'model_ema'; it has keys"),
        (_lacking, "{path}: This is not the state of tokenbridge-test ({count} parameters): 1 missing: mask_token."),
        (
            _left_over,
            "{path}: This is not the state of tokenbridge-test ({count} parameters): 1 left over: diff",
        ),
    ],
    ids=["absent", "cut", "npz", "empty zip", "text", "safetensors", "vae", "no average", "lacking", "left over"],
)
def test_convert_refuses_other_files(
    run_command: Run, tmp_path: Path, preset: str, write: Callable[[Path], Any], message: str
) -> None:
    path = tmp_path / "files" / "checkpoint-last.pth"
    path.parent.mkdir()
    write(write_checkpoint(path))
    size = f"{path.stat().st_size:,}" if path.exists() else ""
    count = f"{sum(p.numel() for p in tiny_model().parameters()):,}"
    expected = message.format(path=path, size=size, count=count)
    assert expected in error_of(run_command("convert", path, preset, "--out", tmp_path / "model"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["files"]  # nothing was begun


def test_convert_names_what_a_checkpoint_is_instead(run_command: Run, tmp_path: Path, preset: str) -> None:
    """Another size, and the one file given as the other."""
    path, vae = write_checkpoint(tmp_path / "checkpoint.pth"), write_kl16(tmp_path / "kl16.ckpt")
    message = error_of(run_command("convert", path, "tokenbridge-l", "--out", tmp_path / "model"))
    assert f"{path}: This is not the state of tokenbridge-l (486,889,472 parameters): " in message
    assert "of another shape: fake_latent [1, 32] instead of [1, 1024]" in message
    message = error_of(run_command("convert", path, "kl16", "--out", tmp_path / "model"))
    assert f"{path}: This is not the state of KL-16" in message
    message = error_of(run_command("convert", vae, preset, "--no-ema", "--out", tmp_path / "model"))
    assert message.endswith(" It is the state of kl16.")
    message = error_of(run_command("convert", path, preset, "--vae", path, "--out", tmp_path / "model"))
    assert f"{path}: This is not the state of KL-16" in message
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint.pth", "kl16.ckpt"]


@pytest.mark.parametrize("place", ["checkpoint", "vae"])
def test_convert_never_runs_pickled_code(run_command: Run, tmp_path: Path, preset: str, place: str) -> None:
    mark, path, vae = tmp_path / "ran", tmp_path / "checkpoint.pth", tmp_path / "kl16.ckpt"
    evil = {"epoch": Malicious(mark)}
    write_checkpoint(path, **(evil if place == "checkpoint" else {}))
    write_kl16(vae, **(evil if place == "vae" else {}))
    message = error_of(run_command("convert", path, preset, "--vae", vae, "--out", tmp_path / "folder"))
    bad = path if place == "checkpoint" else vae
    assert f"{bad} holds pickled code, which is never run (posix.mkdir)." in message
    assert not mark.exists()
    torch.load(bad, weights_only=False)  # the control: it would have run
    assert mark.exists()


@pytest.mark.parametrize("with_vae", [False, True])
def test_convert_leaves_what_is_in_the_way(run_command: Run, tmp_path: Path, preset: str, with_vae: bool) -> None:
    path, vae = write_checkpoint(tmp_path / "checkpoint.pth"), write_kl16(tmp_path / "kl16.ckpt")
    options = ["--vae", vae] if with_vae else []
    index = "model_index.json" if with_vae else "diffusion_pytorch_model.safetensors"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"miaow")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text("of another program")
    (tmp_path / "note").write_text("a file")
    for name, reason in (
        ("photos", f"is not replaced, because it holds cat.png and has no {index}. Name another folder"),
        ("project", f"is not replaced, because it holds config.json and has no {index}. Name another folder"),
        ("note", "is a file, so no folder can be written there. Name another folder."),
    ):
        message = error_of(run_command("convert", path, preset, "--out", tmp_path / name, *options))
        assert f"{tmp_path / name} {reason}" in message
    error_of(run_command("convert", path, preset, "--out", tmp_path / "note" / "model", *options))
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"miaow"
    assert (tmp_path / "note").read_text() == "a file"
    (tmp_path / "empty").mkdir()
    for more in ([], ["--overwrite"]):  # an empty folder is filled; what was converted before is replaced if asked for
        assert run_command("convert", path, preset, "--out", tmp_path / "empty", *options, *more)[0] == 0
        assert (tmp_path / "empty" / index).is_file()
    (tmp_path / "empty" / "notes.md").write_text("mine")
    message = error_of(run_command("convert", path, preset, "--out", tmp_path / "empty", *options))
    assert f"{tmp_path / 'empty'} is not replaced, because it holds notes.md, which is not one of ours." in message
    assert (tmp_path / "empty" / "notes.md").read_text() == "mine"


def test_convert_knows_its_names(run_command: Run, tmp_path: Path, preset: str) -> None:
    path, vae = write_checkpoint(tmp_path / "checkpoint.pth"), write_kl16(tmp_path / "kl16.ckpt")
    message = error_of(run_command("convert", path, "tokenbridge-xl", "--out", tmp_path / "model"))
    assert "Unknown preset 'tokenbridge-xl'; there are tokenbridge-b, tokenbridge-l, tokenbridge-h" in message
    message = error_of(run_command("convert", vae, "kl16", "--vae", vae, "--out", tmp_path / "model"))
    assert "Unknown preset 'kl16'; there are" in message
    code, out, err = run_command("convert", path, preset)  # no folder to write
    assert (code, out) == (2, "")
    assert "--out" in err
