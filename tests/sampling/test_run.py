"""Sampling runs: every image once, whatever kills, divides or resumes the run; and what is refused.

Shape letters: N images of the run, B batch.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, tiny_model
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from official_names import load_official, rule_state, with_rule_weights
from PIL import Image
from samplers import Flat, sampler_of
from torch import Tensor, nn

from tokenbridge.cli import main as cli
from tokenbridge.models.draw import token_chooser
from tokenbridge.models.noise import global_noise
from tokenbridge.models.registry import SYSTEMS
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.models.tokenbridge.presets import PRESETS
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling
from tokenbridge.sampling import run
from tokenbridge.sampling.config import RunConfig, balanced_labels
from tokenbridge.sampling.load import ModelSampler, find_model
from tokenbridge.sampling.run import BadImageError, Sampler, run_recipe, sampling_run, save_overview
from tokenbridge.tokenizers.base import LatentTokenizer
from tokenbridge.tokenizers.kl16 import create_kl16
from tokenbridge.utils import files
from tokenbridge.weights.published import Preset, SamplingRecipe
from tokenbridge.weights.rule import RULE

CPU = torch.device("cpu")


def small_sampler(**changes: Any) -> ModelSampler:
    """Return a TokenBridge of 16 positions with a VAE to 8 × 8 pixels, weights by rule."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()
    sampling = TokenBridgeSampling(num_iterations=4, guidance_scale=2.0)
    return replace(
        sampler_of("tokenbridge", tiny_model(), LatentTokenizer(vae), sampling),
        **changes,
    )


SMALL = small_sampler()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def made(folder: Path) -> list[int]:
    """Return the numbers of the images that are there, and check that nothing half made is."""
    if not (folder / "images").exists():
        return []
    return [int(path.stem) for path in sorted((folder / "images").iterdir())]


def quiet(sampler: Sampler, config: RunConfig, folder: Path) -> run.RunReport:
    return sampling_run(sampler, config, folder, show_progress=False)


# What a run is cut into


@given(st.integers(1, 40), st.integers(1, 12))
def test_balanced_labels(per_class: int, num_classes: int) -> None:
    official = np.arange(0, num_classes).repeat(per_class)  # engine_tokenbridge.py, evaluate
    assert balanced_labels(per_class * num_classes, num_classes) == tuple(official.tolist())


@given(st.integers(1, 200), st.integers(1, 50))
def test_balanced_labels_of_any_number(num_images: int, num_classes: int) -> None:
    labels = balanced_labels(num_images, num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    assert list(labels) == sorted(labels)
    assert len(counts) == num_classes
    assert counts.max() - counts.min() <= 1


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5), st.sets(st.integers(0, 59)))
def test_every_undone_batch_is_one_process_s(
    num_images: int, batch_size: int, num_processes: int, present: set[int]
) -> None:
    config = RunConfig(num_images, batch_size=batch_size)
    states: list[Any] = [SimpleNamespace(process_index=r, num_processes=num_processes) for r in range(num_processes)]
    dealt = [[number for number, _ in run._batches(config, present, state, Path())] for state in states]
    undone = [n for n in range(config.num_batches) if not set(config.batch(n)) <= present]
    assert sorted(number for numbers in dealt for number in numbers) == undone
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    images = [i for number in range(config.num_batches) for i in config.batch(number)]
    assert images == list(range(num_images))


# What comes out


def test_png_folder_holds_the_sampler_s_pixels(tmp_path: Path) -> None:
    report = quiet(SMALL, RunConfig(7, batch_size=3, seed=5), tmp_path / "run")
    assert (report.num_images, report.num_made, report.samples) == (7, 7, tmp_path / "run" / "images")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["images", "run.json"]
    labels = torch.tensor(balanced_labels(7, 5))
    for batch in (range(3), range(3, 6), range(6, 7)):
        pixels = SMALL.images(labels[list(batch)], batch, 5)
        for i, image in zip(batch, pixels, strict=True):
            stored = np.asarray(Image.open(report.samples / f"{i:06d}.png"))
            assert np.array_equal(stored, image.permute(1, 2, 0).numpy())
    assert made(tmp_path / "run") == list(range(7))


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_adm_s(tmp_path: Path, channels: int) -> None:
    sampler, labels = Flat(channels=channels), (4, 0, 0, 2, 1)
    config = RunConfig(5, labels=labels, batch_size=2, seed=1)
    report = quiet(sampler, replace(config, format="npz"), tmp_path / "npz")
    pixels = quiet(sampler, config, tmp_path / "png").samples
    with np.load(report.samples, allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert (file["arr_0"].dtype, file["arr_0"].shape) == (np.uint8, (5, 4, 4, 3))
        assert file["arr_1"].tolist() == list(labels)
        for i, array in enumerate(file["arr_0"]):
            assert np.array_equal(array, np.asarray(Image.open(pixels / f"{i:06d}.png").convert("RGB")))
    assert sorted(p.name for p in (tmp_path / "npz").iterdir()) == ["run.json", "samples.npz"]
    for samples in (report.samples, pixels):
        save_overview(tmp_path / "grid.png", samples, "title", num_images=3)
        assert Image.open(tmp_path / "grid.png").size[0] > 50


def test_finished_run_makes_nothing_again(tmp_path: Path) -> None:
    for config in (RunConfig(4), RunConfig(4, format="npz")):
        folder = tmp_path / config.format
        first = quiet(SMALL, config, folder)
        stamp = first.samples.stat().st_mtime_ns
        again = quiet(SMALL, config, folder)
        assert (again.num_made, again.images_per_second) == (0, None)
        assert first.samples.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(tmp_path: Path, dtype: Any) -> None:
    config = RunConfig(4)
    half, full = quiet(replace(SMALL, dtype=dtype), config, tmp_path / dtype), quiet(SMALL, config, tmp_path / "fp32")
    assert contents(half.samples) != contents(full.samples)
    recipe = json.loads((tmp_path / dtype / "run.json").read_text())["recipe"]
    assert recipe["sampler"]["dtype"] == dtype


def test_compiled_system_makes_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, but by the eager backend: inductor takes half a minute."""
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: plain(self, backend="eager", **options))
    system = find_model("tokenbridge-tiny").sampled(num_iterations=3)
    labels, both = torch.arange(2), []
    for compiled in (False, True):
        sampler = system.load(CPU, compiled=compiled)
        assert sampler.describe()["compiled"] == compiled
        both.append(sampler.images(labels, range(2), 0))
    assert (both[0] != both[1]).float().mean() < 0.01


# Processes


def test_two_processes_make_the_images_of_one(tmp_path: Path) -> None:
    """End to end: torchrun with two processes (gloo), against one."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "tokenbridge", "sample", "tokenbridge-tiny", "--num-iterations", "4", "--json"]
    options = ["--num-images", "11", "--batch-size", "2", "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, *torchrun, *command, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_made"] == 11  # printed once
    sampler = find_model("tokenbridge-tiny").sampled(num_iterations=4).load(CPU)
    one = quiet(sampler, RunConfig(11, batch_size=2), tmp_path / "one")
    assert contents(one.samples) == contents(tmp_path / "two" / "images")
    recipes = [json.loads((tmp_path / name / "run.json").read_text())["recipe"] for name in ("one", "two")]
    assert recipes[0] == recipes[1]


# Killed and resumed


def killed_run(sampler: Sampler, config: RunConfig, folder: Path, delays: Iterator[float]) -> int:
    """Start the run in a process of its own, kill it after a while, again and again until one gets to the end."""
    for num_kills, delay in enumerate(delays):
        child = os.fork()
        if child == 0:
            try:
                quiet(sampler, config, folder)
                os._exit(0)
            finally:
                os._exit(1)
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline:
            finished, status = os.waitpid(child, os.WNOHANG)
            if finished:
                assert status == 0
                return num_kills
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    raise AssertionError("unreachable")


@pytest.mark.parametrize("randomness", ["per-image", "official"])
@pytest.mark.parametrize("file_format", ["png", "npz"])
def test_killed_at_random_it_makes_the_same_images(tmp_path: Path, randomness: Any, file_format: Any) -> None:
    config = RunConfig(60, batch_size=4, randomness=randomness, format=file_format)
    start = time.monotonic()
    whole = quiet(SMALL, config, tmp_path / "whole")
    seconds = time.monotonic() - start
    chance = random.Random(f"{randomness} {file_format}")
    inodes: dict[str, int] = {}

    def delays() -> Iterator[float]:
        for longer in itertools.count(1):  # or else a loaded machine might never get a batch done
            for path in (tmp_path / "killed" / "images").glob("[0-9]*.png"):
                assert inodes.setdefault(path.name, path.stat().st_ino) == path.stat().st_ino, "an image made again"
            yield chance.uniform(0.0, 0.4) * seconds * (1 + longer / 20)

    assert killed_run(SMALL, config, tmp_path / "killed", delays()) > 2
    killed = tmp_path / "killed" / whole.samples.name
    if file_format == "png":
        assert contents(killed) == contents(whole.samples)
    else:
        with np.load(killed) as ours, np.load(whole.samples) as theirs:
            assert all(np.array_equal(ours[name], theirs[name]) for name in ("arr_0", "arr_1"))
    others = {path.name for path in (tmp_path / "killed").iterdir()} - {killed.name}
    assert others == {"run.json"} | ({"streams-0000.pt"} if randomness == "official" else set())


@pytest.mark.parametrize("randomness", ["per-image", "official"])
def test_lost_image_is_made_again_and_no_other(tmp_path: Path, randomness: Any) -> None:
    config = RunConfig(10, batch_size=3, randomness=randomness)
    samples = quiet(SMALL, config, tmp_path).samples
    before = contents(samples)
    (samples / "000004.png").unlink()
    stamps = {path.name: path.stat().st_mtime_ns for path in samples.iterdir()}
    assert quiet(SMALL, config, tmp_path).num_made == 1
    assert contents(samples) == before
    assert {name: (samples / name).stat().st_mtime_ns for name in stamps} == stamps


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    quiet(Flat(), RunConfig(4), tmp_path)
    dead = f".tokenbridge-{files._machine()}-{10**9}-1-abcdef12"  # Linux numbers no process so high
    begun = [f"images/{dead}.png", f"{dead}.json", f"{dead}.pt"]
    for name in [*begun, ".mine", "images/.mine"]:
        (tmp_path / name).write_text("half")
    quiet(Flat(), RunConfig(4), tmp_path)
    assert not [name for name in begun if (tmp_path / name).exists()]
    assert (tmp_path / ".mine").exists()
    assert (tmp_path / "images" / ".mine").exists()


# Official randomness


def test_official_streams_run_on_through_a_process_s_batches(tmp_path: Path) -> None:
    """Two processes of a run of 3 batches: seeds 7 and 8, each run on; the last batch is filled up."""
    sampler, config = Flat(), RunConfig(8, batch_size=3, seed=7, randomness="official")
    for rank, own in ((0, [0, 2]), (1, [1])):
        state: Any = SimpleNamespace(process_index=rank, num_processes=2)
        ours = []
        for number, seed in run._batches(config, set(), state, tmp_path):
            assert seed is None
            ours.append((number, run._make(sampler, config, torch.zeros(8, dtype=torch.int64), number, seed, CPU)))
        torch.manual_seed(7 + rank)
        np.random.seed(7 + rank)  # noqa: NPY002
        for _, pixels in ours:
            expected = sampler.images(torch.zeros(3, dtype=torch.int64), range(3), None)
            assert torch.equal(pixels, expected[: len(pixels)])
        assert [number for number, _ in ours] == own


@given(st.integers(1, 6), st.integers(2, 40), st.floats(0.3, 3.0), st.integers(0, 2**31 - 1))
def test_tokens_are_multinomial_s(num_rows: int, num_levels: int, temperature: float, seed: int) -> None:
    """The official code calls torch.multinomial; our draw takes the same numbers and never waits."""
    logits = torch.randn(num_rows, num_levels, generator=torch.Generator().manual_seed(seed)) * 3
    torch.manual_seed(seed)
    expected = torch.multinomial((logits / temperature).softmax(-1), num_samples=1).squeeze(-1)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    assert torch.equal(token_chooser(temperature, None)(logits, 0), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_orders_are_numpy_s_shuffles() -> None:
    np.random.seed(3)  # noqa: NPY002
    expected = []
    for _ in range(3):
        order = np.arange(16)
        np.random.shuffle(order)  # noqa: NPY002  models/tokenbridge.py, sample_orders
        expected.append(order)
    np.random.seed(3)  # noqa: NPY002
    assert np.array_equal(global_noise(3, 16).orders.numpy(), np.stack(expected))


def test_official_tokens_are_drawn_for_rising_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official code lists what it predicts by a mask's nonzero, image after image."""
    asked: list[Tensor] = []
    context = SMALL.model.context

    def spy(*arguments: Any, **options: Any) -> Tensor:
        asked.append(options["positions"][:2])
        return context(*arguments, **options)

    monkeypatch.setattr(SMALL.model, "context", spy)
    rising = []
    for seed in (None, 0):
        asked.clear()
        SMALL.images(torch.tensor([0, 1]), [0, 1], seed)
        assert torch.cat(asked, dim=1).sort(dim=1).values.tolist() == [list(range(16))] * 2
        rising.append(all(bool((positions.diff(dim=1) > 0).all()) for positions in asked))
    assert rising == [True, False]


def test_official_run_is_another_than_per_image(tmp_path: Path) -> None:
    one = quiet(SMALL, RunConfig(4), tmp_path / "a").samples
    other = quiet(SMALL, RunConfig(4, randomness="official"), tmp_path / "b").samples
    assert contents(one) != contents(other)
    recipe = run_recipe(SMALL, RunConfig(4, randomness="official"), 2)
    assert recipe["num_processes"] == 2
    assert "num_processes" not in run_recipe(SMALL, RunConfig(4), 2)


# What is refused


@pytest.mark.parametrize(
    ("sampler", "config", "message"),
    [
        (Flat(), RunConfig(6, seed=1), "seed was 0 and is now 1"),
        (Flat(), RunConfig(7), "num_images was 6 and is now 7"),
        (Flat(), RunConfig(7), "balanced labels depend on the number of images"),
        (Flat(), RunConfig(6, labels=(0, 0, 1, 2, 3, 3)), "the label of image 5 was 4 and is now 3"),
        (Flat(), RunConfig(6, labels=(1,) * 6), 'labels was "balanced" and is now "1,1,1,1,1,1"'),
        (Flat(), RunConfig(6, format="npz"), 'format was "png" and is now "npz"'),
        (Flat(), RunConfig(6, randomness="official"), "num_processes was null and is now 1"),
        (Flat(salt=2), RunConfig(6), "sampler.salt was 0 and is now 2"),
        (Flat(name="round"), RunConfig(6), 'sampler.name was "flat" and is now "round"'),
    ],
)
def test_other_recipe_in_the_same_folder(tmp_path: Path, sampler: Flat, config: RunConfig, message: str) -> None:
    quiet(Flat(), RunConfig(6), tmp_path)
    before = contents(tmp_path / "images")
    with pytest.raises(ValueError, match="another recipe") as error:
        quiet(sampler, config, tmp_path)
    assert message in str(error.value)
    assert contents(tmp_path / "images") == before


def test_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no run \(notes.txt is in it\)"):
        quiet(Flat(), RunConfig(2), tmp_path)
    (tmp_path / "run.json").write_text('{"recipe"')
    with pytest.raises(ValueError, match="damaged"):
        quiet(Flat(), RunConfig(2), tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine", "run.json": b'{"recipe"'}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "number of images must be at least 1, not 0"),
        ({"num_images": -3}, "number of images must be at least 1, not -3"),
        ({"batch_size": 0}, "batch size"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"randomness": "none"}, "Unknown randomness"),
        ({"format": "gif"}, "Unknown format"),
        ({"labels": (1, 2)}, "2 labels for 4 images"),
    ],
)
def test_bad_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**{"num_images": 4, **options})


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range(tmp_path: Path, label: int) -> None:
    with pytest.raises(ValueError, match=f"no class {label}; the labels are 0 to 4"):
        quiet(SMALL, RunConfig(2, labels=(0, label)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["is black", "has NaN pixels"])
def test_bad_image_stops_the_run(tmp_path: Path, what: str) -> None:
    sampler, config = Flat(bad=(8, 7), what=what), RunConfig(12, batch_size=3, seed=4)
    with pytest.raises(FloatingPointError, match=rf"Image 7 \(seed 4, class 2\) of flat {what}"):
        quiet(sampler, config, tmp_path)
    assert made(tmp_path) == list(range(6))  # the batches before; nothing of the bad one
    assert quiet(replace(sampler, bad=()), config, tmp_path).num_made == 6


def test_nan_weights_are_found() -> None:
    broken = small_sampler()
    with torch.no_grad():
        broken.model.get_parameter("head.channel_heads.2.bias")[3] = torch.nan
    with pytest.raises(BadImageError, match="NaN logits") as error:
        broken.images(torch.tensor([1, 2]), [0, 1], 0)
    assert error.value.row == 0
    broken = small_sampler()
    with torch.no_grad():
        broken.tokenizer.autoencoder.get_parameter("decoder.conv_out.bias")[0] = torch.nan
    for seed in (0, None):
        with pytest.raises(BadImageError, match="NaN pixels"):
            broken.images(torch.tensor([1, 2]), [0, 1], seed)


def test_out_of_memory_names_the_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def images(*arguments: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Flat, "images", images)
    with pytest.raises(ValueError, match="9 images at a time"):
        quiet(Flat(), RunConfig(20, batch_size=9), tmp_path)


# The disk


@pytest.mark.parametrize("file_format", ["png", "npz"])
def test_full_disk_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: Any) -> None:
    config = RunConfig(9, batch_size=2, format=file_format)
    plain, count = os.replace, 0

    def full(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        plain(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"no space left for .* are kept: make room"):
        quiet(SMALL, config, tmp_path / "run")
    monkeypatch.undo()
    folder = tmp_path / "run" / ("images" if file_format == "png" else "parts")
    there = contents(folder)
    assert len(there) == 3  # run.json was the first file
    report = quiet(SMALL, config, tmp_path / "run")
    assert report.num_made == 9 - (3 if file_format == "png" else 6)
    other = quiet(SMALL, config, tmp_path / "other").samples
    if file_format == "png":
        assert contents(report.samples) == contents(other)
        assert there.items() <= contents(report.samples).items()
    else:
        assert np.array_equal(np.load(report.samples)["arr_0"], np.load(other)["arr_0"])


def test_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=f"{folder} cannot be written to"):
            quiet(Flat(), RunConfig(2), folder)
    assert (tmp_path / "file").read_text() == "in the way"
    (tmp_path / "closed").mkdir(mode=0o500)
    if not os.access(tmp_path / "closed", os.W_OK):  # root may write anywhere
        with pytest.raises(OSError, match="cannot be written to: Permission denied"):
            quiet(Flat(), RunConfig(2), tmp_path / "closed")


# Progress


def test_progress_in_a_log_is_no_flood(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sampling_run(Flat(), RunConfig(60, batch_size=1), tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "60 of 60 images" in err
    assert "images/s" in err
    assert "GiB" in err


def test_progress_on_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    sampling_run(Flat(), RunConfig(6, batch_size=2), tmp_path)
    _, err = capfd.readouterr()
    assert "6/6" in err
    assert "images/s" in err


# Systems by name


def saved(module: Any, folder: Path) -> Path:
    module.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Declare a small published preset with a small KL-16, write both, and return `find_model` for it."""
    sizes = {**TINY, "num_channels": 16, "channel_order": tuple(range(16))}
    sampling = {name: SamplingRecipe(TokenBridgeSampling(n), "test") for name, n in (("official", 3), ("paper", 2))}
    preset = Preset("mini", sizes, 0, official_name="tokenbridge_mini", sampling=sampling)
    monkeypatch.setitem(PRESETS, "mini", preset)
    model = saved(with_rule_weights(TokenBridge(**sizes), {"rule": RULE, "salt": "tiny"}), tmp_path / "model")
    create = functools.partial(create_kl16, ch=32, ch_mult=(1, 1), num_res_blocks=1)
    system = SYSTEMS["tokenbridge"]
    monkeypatch.setitem(SYSTEMS, "tokenbridge", replace(system, tokenizer=replace(system.tokenizer, create=create)))
    vae = create()
    load_official(vae, rule_state(vae, {"rule": "fan-in-normal-v1", "salt": "vae"}))
    saved(vae, tmp_path / "vae")

    def find(name: str | None = None, **options: Any) -> Any:
        return find_model(name or str(model), **options)

    return find


def test_converted_folder_of_a_published_model(published: Callable[..., Any], tmp_path: Path) -> None:
    by_path = published(preset="mini", vae=tmp_path / "vae")
    by_option = published("mini", weights=tmp_path / "model", vae=tmp_path / "vae")
    labels = torch.tensor([1, 2])
    samplers = [system.load(CPU) for system in (by_path, by_option)]
    first, second = (sampler.images(labels, range(2), 0) for sampler in samplers)
    assert torch.equal(first, second)
    assert first.shape == (2, 3, 8, 8)
    assert samplers[0].describe() == samplers[1].describe()
    assert by_path.num_iterations == 3
    assert published("mini", variant="paper").num_iterations == 2
    assert by_path.dtype(None, torch.device("cuda")) == "fp16"  # as the official evaluation
    assert by_path.dtype(None, CPU) == "fp32"


def test_missing_files_are_listed_together(published: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        published("mini", weights=tmp_path / "none.pth").load(CPU)
    assert f"generator of mini: there is no {tmp_path / 'none.pth'}" in str(error.value)
    assert "VAE of mini: name its file or folder with --vae" in str(error.value)


def test_unknown_names(published: Callable[..., Any], tmp_path: Path) -> None:
    for options, message in (
        ({"name": "tokenbridge-xl"}, "Unknown model 'tokenbridge-xl'"),
        ({"name": str(tmp_path / "none")}, "Unknown model"),
        ({"preset": "huge"}, "Unknown preset 'huge'"),
        ({}, "holds with --preset"),
        ({"preset": "mini", "weights": tmp_path}, "given twice"),
        ({"name": "mini", "variant": "mine"}, "no sampling settings 'mine'"),
        ({"name": "mini", "preset": "mini"}, "no path 'mini'"),
    ):
        with pytest.raises(ValueError, match=message):
            published(**options)


# Stand-ins, and the command


def test_stand_in_is_marked_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", "tokenbridge-tiny", "--stand-in", "--out", str(tmp_path / "run")]
    for options in ([], ["--format", "npz", "--out", str(tmp_path / "npz")]):
        monkeypatch.setattr(sys, "argv", ["tokenbridge", *arguments, *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        out, err = capfd.readouterr()
        assert "stand-in weights, no result" in out
        assert "stand-in weights, no result" in err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["grid.png", "no-result", "run.json"]
    assert sorted(p.name for p in (tmp_path / "npz").iterdir()) == ["grid.png", "no-result.npz", "run.json"]
    recipe = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert "stand-ins" in recipe["no_result"]
    assert recipe["sampler"]["weights"] == {"rule": "fan-in-normal-v1", "salt": "stand-in"}
    assert len(contents(tmp_path / "run" / "no-result")) == 2


def test_stand_in_has_the_rule_s_weights() -> None:
    sampler = find_model("tokenbridge-tiny").stand_in(CPU)
    expected = with_rule_weights(TokenBridge(**PRESETS["tokenbridge-tiny"].model), {"rule": RULE, "salt": "stand-in"})
    ours = dict(sampler.model.named_parameters())
    assert all(torch.equal(ours[name], parameter) for name, parameter in expected.named_parameters())
