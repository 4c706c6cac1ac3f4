"""A model is loaded from the very bytes that were hashed, or one sentence says why it is not."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.hashed import opened, recording
from tokenbridge.weights.diffusers import CONFIG_FILE, WEIGHTS_FILE, load_model
from tokenbridge.weights.torch_files import read_checkpoint, read_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_state(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    state = change(load_file(folder / WEIGHTS_FILE))
    save_file({name: value.contiguous() for name, value in state.items()}, folder / WEIGHTS_FILE)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v is not ...}))


def test_the_recorded_hashes_are_those_of_what_was_read(folder: Path) -> None:
    with recording() as read:
        load_model(TokenBridge, folder)
    names = (CONFIG_FILE, WEIGHTS_FILE)
    assert read == {folder / name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_an_index_and_other_weights_beside_the_hashed_ones_do_not_matter(folder: Path) -> None:
    expected = load_model(TokenBridge, folder).state_dict()
    zeros = {name: torch.zeros_like(value) for name, value in load_file(folder / WEIGHTS_FILE).items()}
    save_file(zeros, folder / "other.safetensors")
    save_file(zeros, folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(zeros, "other.safetensors")}
    (folder / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps(index))
    loaded = load_model(TokenBridge, folder).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    followed: Any = TokenBridge.from_pretrained(folder)  # the control: diffusers follows the index
    assert all(not parameter.any() for parameter in followed.parameters())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_stripped(folder: Path, prefix: str) -> None:
    expected = load_model(TokenBridge, folder).state_dict()
    change_state(folder, lambda state: {prefix + name: value for name, value in state.items()})
    loaded = load_model(TokenBridge, folder).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def first_as(value: Callable[[Any], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        change_state(folder, lambda state: {n: value(x) if i == 0 else x for i, (n, x) in enumerate(state.items())})

    return change


def sparse(folder: Path) -> None:
    os.truncate(folder / WEIGHTS_FILE, 2**33)


def sparse_alone(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes(b"")
    sparse(folder)


def fifo(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def renamed(folder: Path, name: str) -> None:
    (folder / WEIGHTS_FILE).rename(folder / name)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "integers": (first_as(lambda x: x.to(torch.int32)), "is of the type I32, not floating point"),
    "booleans": (first_as(lambda x: x.bool()), "is of the type BOOL, not floating point"),
    "NaN": (first_as(lambda x: x * torch.nan), "NaN or infinite"),
    "infinity": (first_as(lambda x: x + torch.inf), "NaN or infinite"),
    "shape": (first_as(lambda x: x.flatten()[:1]), "misfits 1 weights"),
    "lacking": (lambda f: change_state(f, lambda s: dict(list(s.items())[1:])), "lacks 1 weights"),
    "unknown": (lambda f: change_state(f, lambda s: {**s, "more": torch.ones(1)}), "has unknown 1 weights: ['more']"),
    "no tensors": (lambda f: change_state(f, lambda s: {}), "more weights than the 0"),
    "cut": (lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-9]), "as a safetensors file"),
    "longer": (lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes() + b"0"), "a safetensors file"),
    "empty": (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), "as a safetensors file"),
    "text": (lambda f: (f / WEIGHTS_FILE).write_text("<html>404</html>" * 9), "as a safetensors file"),
    "header": (lambda f: (f / WEIGHTS_FILE).write_bytes(b"\xff" * 99), "as a safetensors file"),
    "lfs": (lambda f: (f / WEIGHTS_FILE).write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "sparse end": (sparse, "as a safetensors file"),
    "8 GB without a header": (sparse_alone, "as a safetensors file"),
    "pipe": (lambda f: fifo(f, WEIGHTS_FILE), "is not a regular file"),
    "fp16 only": (
        lambda f: renamed(f, "diffusion_pytorch_model.fp16.safetensors"),
        "holds diffusion_pytorch_model.fp16",
    ),
    "bin only": (lambda f: renamed(f, "diffusion_pytorch_model.bin"), "The folder holds diffusion_pytorch_model.bin"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "There are no weights at"),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), "There is no file"),
    "config cut": (lambda f: (f / CONFIG_FILE).write_text('{"width": 3'), "config.json cannot be read as the config"),
    "config of a list": (lambda f: (f / CONFIG_FILE).write_text("[1]"), "has no _class_name"),
    "config empty": (lambda f: (f / CONFIG_FILE).write_text(""), "config.json cannot be read"),
    "config deep": (lambda f: (f / CONFIG_FILE).write_text("[" * 10**5), "config.json cannot be read"),
    "config pipe": (lambda f: fifo(f, CONFIG_FILE), "regular file"),
    "config long": (lambda f: (f / CONFIG_FILE).write_text(" " * 2**21), "is longer than"),
    "no class": (lambda f: change_config(f, _class_name=...), "has no _class_name"),
    "class of a number": (lambda f: change_config(f, _class_name=3), "has no _class_name"),
    "another class": (lambda f: change_config(f, _class_name="MAR"), "configures a MAR, not a TokenBridge"),
    "depth": (lambda f: change_config(f, encoder_depth=10**5), "more weights than"),
    "number": (lambda f: change_config(f, encoder_depth=10**12), "more than any setting of a model"),
    "infinite": (lambda f: change_config(f, width=float("inf")), "more than any setting of a model"),
    "width": (lambda f: change_config(f, width=64), "misfits"),
    "text as width": (lambda f: change_config(f, width="wide"), "as the configuration of TokenBridge"),
    "negative": (lambda f: change_config(f, width=-32), "config.json"),
    "null": (lambda f: change_config(f, num_levels=None), "as the configuration of TokenBridge"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_models_are_one_sentence(folder: Path, name: str) -> None:
    damage, words = BAD[name]
    damage(folder)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        load_model(TokenBridge, folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf"), "1"])
def test_a_scale_that_is_none_is_refused(tmp_path: Path, scale: Any) -> None:
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    change_config(tmp_path, scaling_factor=scale)
    with pytest.raises(UserError, match=r"scaling_factor is|more than any setting"):
        load_model(AutoencoderKL, tmp_path)


# ------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("state", [{"a": torch.zeros(1).expand(10**12)}, {"a": torch.zeros(2).expand(10**9, 2)}])
def test_a_checkpoint_that_claims_more_than_it_holds_is_refused(tmp_path: Path, state: Any) -> None:
    torch.save({"model": state, "model_ema": state}, tmp_path / "bomb.pth")
    for read in (read_checkpoint, read_weights):
        with pytest.raises(UserError, match=r"'a' \[.*\] claims more numbers than the file holds"):
            read(tmp_path / "bomb.pth")


def test_many_views_of_one_tensor_are_refused(tmp_path: Path) -> None:
    one = torch.zeros(1000)
    torch.save({"model": {str(i): one for i in range(1000)}}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="claims more numbers"):
        read_weights(tmp_path / "bomb.pth")


def test_an_average_as_a_list_and_no_average_name_the_way_on(tmp_path: Path) -> None:
    weights = {"a": torch.ones(2)}
    torch.save({"model": weights, "model_ema": [torch.ones(2)]}, tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"holds a list under 'model_ema', and no tensors by name\. .* with --no-ema"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"model": weights}, tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"no weights under 'model_ema'; .* with --no-ema"):
        read_checkpoint(tmp_path / "none.pth")


@pytest.mark.parametrize("swap", ["replaced", "written"])
def test_a_file_that_is_swapped_while_it_is_read_is_refused(tmp_path: Path, swap: str) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"first")
    other.write_bytes(b"other")
    with recording() as read:
        with pytest.raises(UserError, match="was changed while it was read"), opened(path) as file:  # noqa: PT012
            if swap == "replaced":
                other.replace(path)
                assert file.read_bytes() == b"first"  # the file that was opened
            else:
                path.write_bytes(b"longer")
        assert not read


def test_a_file_that_changes_between_two_readings_is_refused(folder: Path) -> None:
    with recording():
        load_model(TokenBridge, folder)
        first_as(lambda x: x + 1)(folder)
        with pytest.raises(UserError, match="has changed since this command first read it"):
            load_model(TokenBridge, folder)
