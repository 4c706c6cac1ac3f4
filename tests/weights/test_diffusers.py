"""A TokenBridge on disk in diffusers' formats: bit for bit, whatever the files are; and what loading costs."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from official_names import from_official, load_official, to_official

from tokenbridge.models.noise import image_noise
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.models.tokenbridge.presets import PRESETS, create_model
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling, generate_tokens
from tokenbridge.weights.published import find_preset
from tokenbridge.weights.torch_files import read_checkpoint


def settings_of(model: TokenBridge) -> dict[str, Any]:
    """Return a model's settings, as JSON keeps them."""
    config: Any = model.config
    return dict(json.loads(json.dumps({key: value for key, value in config.items() if not key.startswith("_")})))


def assert_same(loaded: TokenBridge, model: TokenBridge, dtype: torch.dtype = torch.float32) -> None:
    """Check that settings, names and every bit of the weights are those of `model`, rounded to `dtype`."""
    assert settings_of(loaded) == settings_of(model)
    ours, expected = loaded.state_dict(), model.state_dict()
    assert ours.keys() == expected.keys()
    assert {value.dtype for value in ours.values()} == {dtype}
    assert all(torch.equal(ours[name], expected[name].to(dtype)) for name in expected)
    assert not loaded.training


@st.composite
def models(draw: st.DrawFn) -> TokenBridge:
    """Draw models of any settings, with weights by the golden rule."""
    num_channels = draw(st.integers(1, 5))
    return tiny_model(
        latent_size=draw(st.integers(1, 4)),
        num_channels=num_channels,
        channel_order=tuple(draw(st.permutations(range(num_channels)))),
        num_classes=draw(st.integers(1, 5)),
        num_levels=draw(st.integers(2, 65)),
        value_range=draw(st.sampled_from([2.0, 5.0])),
        head_type=draw(st.sampled_from(["ar", "parallel"])),
        decoder_width=draw(st.sampled_from([None, 16])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
    )


@settings(max_examples=12)
@given(model=models(), low_cpu_mem_usage=st.booleans())
def test_round_trip(model: TokenBridge, low_cpu_mem_usage: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert sorted(path.name for path in Path(folder).iterdir()) == [
            "config.json",
            "diffusion_pytorch_model.safetensors",
        ]
        assert_same(TokenBridge.from_pretrained(folder, low_cpu_mem_usage=low_cpu_mem_usage), model)


def test_the_loaded_model_makes_the_same_tokens(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config, noise = TokenBridgeSampling(num_iterations=5, guidance_scale=2.0), image_noise(3, [0, 1], 16, 4)
    labels = torch.tensor([4, 0])
    loaded = TokenBridge.from_pretrained(tmp_path)
    assert torch.equal(generate_tokens(loaded, labels, config, noise), generate_tokens(model, labels, config, noise))


def test_shards(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert_same(TokenBridge.from_pretrained(tmp_path), model)
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        TokenBridge.from_pretrained(tmp_path)


def test_variants(tmp_path: Path) -> None:
    """Two precisions side by side in one folder."""
    model, half = tiny_model(), tiny_model().half()
    model.save_pretrained(tmp_path)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="40KB")
    assert len(list(tmp_path.glob("diffusion_pytorch_model.fp16-*.safetensors"))) > 1
    assert_same(TokenBridge.from_pretrained(tmp_path), model)
    assert_same(TokenBridge.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16), half, torch.float16)
    widened = TokenBridge.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float32)
    assert_same(widened, tiny_model().half().float())
    with pytest.raises(OSError, match="no file named"):
        TokenBridge.from_pretrained(tmp_path, variant="bf16", use_safetensors=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert_same(TokenBridge.from_pretrained(tmp_path, torch_dtype=dtype), model, dtype)


# ------------------------------------------------------------------------------------------------- memory

MEDIUM = {"width": 768, "encoder_depth": 2, "decoder_depth": 2, "head_width": 64, "head_depth": 1}


def own_memory() -> int:
    """Return the bytes of this process alone; pages of a mapped file, which the system may drop, do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon:")))


def peak_while(load: Callable[[], Any]) -> int:
    """Return by how many bytes this process's own memory grows, at most, during `load` and at its end."""
    before, peak, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, own_memory())
            time.sleep(1e-3)

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = load()  # kept until the last look
    peak = max(peak, own_memory())
    done.set()
    watcher.join()
    del loaded
    return peak - before


def peaks(checkpoint: Path, folder: Path) -> dict[str, int]:
    """Load in several ways, in a process of its own; return the peak of each in bytes."""

    def official() -> TokenBridge:
        model = create_model("tokenbridge-l", **MEDIUM)
        load_official(model, read_checkpoint(checkpoint))
        return model

    def plain() -> TokenBridge:
        model = TokenBridge(**{**find_preset("tokenbridge-l", PRESETS).model, **MEDIUM})
        state = torch.load(checkpoint, weights_only=True)["model_ema"]
        model.load_state_dict({**dict(model.named_buffers()), **from_official(model, state)})
        return model

    ways: dict[str, Callable[[], Any]] = {
        "official": official,
        "pretrained": lambda: TokenBridge.from_pretrained(folder),
        "plain": plain,
    }
    return {name: peak_while(load) for name, load in ways.items()}


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the kernel does not tell a process's own memory")
def test_loading_needs_no_second_copy(tmp_path: Path) -> None:
    """One copy of the weights, within 10%, though the checkpoint holds two; plainly loaded: three."""
    model = create_model("tokenbridge-l", **MEDIUM).to_empty(device="cpu")
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 100e6
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    state = to_official(model)
    last = {name: value + 1 for name, value in state.items()}
    torch.save({"model": last, "model_ema": state}, tmp_path / "checkpoint.pth")
    model.save_pretrained(tmp_path / "model", max_shard_size="50MB")
    del model, state, last
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        measured = pool.submit(peaks, tmp_path / "checkpoint.pth", tmp_path / "model").result(timeout=120)
    assert 0.9 * size < measured["official"] < 1.1 * size
    assert measured["pretrained"] < 1.1 * size
    assert measured["plain"] > 2 * size  # the control: a second copy would be seen
