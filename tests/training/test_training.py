"""The training loop: schedule, order of images, determinism, resumption after a kill, EMA; latents on disk."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from datasets import Dataset
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from tokenbridge.configs.schema import TrainingConfig
from tokenbridge.data.latents import cache_latents
from tokenbridge.models.tokenbridge.model import generator_loss
from tokenbridge.tokenizers.base import sample_posterior
from tokenbridge.training.loop import batch_indices, learning_rate_at, step_seed, train
from tokenbridge.utils import console
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.states import save_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Checkpoints at steps 20, 40, 60 and 70; a point of the loss curve at each of them.
CONFIG = TrainingConfig(
    num_steps=70, batch_size=8, learning_rate=1e-2, warmup_steps=10, ema_decay=0.9, checkpoint_every=20
)
NUM_IMAGES = 23  # no multiple of the batch: batches reach over the end of a pass


class Tiny(nn.Module):
    """A convolution, dropout and a linear layer: 2-D and 1-D parameters, and random draws in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.linear = nn.Linear(4 * 16, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = F.dropout(self.convolution(images).relu().flatten(1), 0.2, self.training)
        logits: Tensor = self.linear(features)
        return logits


def tiny() -> Tiny:
    torch.manual_seed(5)
    return Tiny()


@functools.cache
def toy_data(count: int = NUM_IMAGES) -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((count, 1, 6, 6)).astype(np.float32)
    labels = (images.mean((1, 2, 3)) > 0).astype(np.int64) + (images[:, 0, 0, 0] > 1)
    return Dataset.from_dict({"images": images.tolist(), "labels": labels.tolist()}).with_format("torch")


def toy_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy under noise, which draws from torch's global generator as the real losses do."""
    images = batch["images"]
    return F.cross_entropy(model(images + 0.1 * torch.randn_like(images)), batch["labels"])


def fit(folder: Path, config: TrainingConfig = CONFIG, **changes: Any) -> tuple[Tiny, dict[str, Any]]:
    model = tiny()
    loss = changes.pop("loss", toy_loss)
    config = dataclasses.replace(config, **changes)
    return model, train(model, toy_data(), loss, config, folder, show_progress=False)


def weights(model: nn.Module) -> bytes:
    return b"".join(value.numpy().tobytes() for value in model.state_dict().values())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return *fit(folder), folder


# ---------------------------------------------------------------- schedule


def test_learning_rate_endpoints() -> None:
    config = TrainingConfig(num_steps=1000, warmup_steps=100, learning_rate=2e-3)
    assert learning_rate_at(0, config) == 2e-3 / 100
    assert learning_rate_at(99, config) == 2e-3
    assert learning_rate_at(100, config) == 2e-3
    assert learning_rate_at(550, config) == pytest.approx(1e-3, rel=1e-12)  # half of the cosine; float rounding
    assert 0 < learning_rate_at(999, config) < 1e-8
    assert learning_rate_at(1000, config) == 0


@given(num_steps=st.integers(1, 300), warmup=st.integers(0, 400))
def test_learning_rate_rises_then_falls(num_steps: int, warmup: int) -> None:
    config = TrainingConfig(num_steps=num_steps, warmup_steps=warmup, learning_rate=1.0)
    rates = [learning_rate_at(step, config) for step in range(num_steps)]
    assert all(0 < rate <= 1 for rate in rates)
    rising, falling = rates[:warmup], rates[warmup:]
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert all(a > b for a, b in itertools.pairwise(falling))


@pytest.mark.parametrize("bad", [{"num_steps": 0}, {"num_steps": 1, "batch_size": 0}])
def test_config_refuses_nothing_to_do(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        TrainingConfig(**bad)


# ---------------------------------------------------------------- order of the images


@given(num_images=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_every_image_once_a_pass(num_images: int, batch_size: int, seed: int) -> None:
    num_steps = math.ceil(3 * num_images / batch_size)
    drawn = np.concatenate([batch_indices(num_images, batch_size, seed, step) for step in range(num_steps)])
    for i in range(3):
        assert sorted(drawn[i * num_images : (i + 1) * num_images]) == list(range(num_images))


@given(seed=st.integers(0, 1000), step=st.integers(0, 500))
def test_batches_are_a_function_of_seed_and_step(seed: int, step: int) -> None:
    first, again = (batch_indices(50, 8, seed, step) for _ in range(2))
    assert np.array_equal(first, again)
    assert len(first) == 8


def test_orders_differ_between_seeds_and_passes() -> None:
    passes = [tuple(batch_indices(50, 50, seed, step)) for seed in range(10) for step in range(10)]
    assert len(set(passes)) == 100


def test_step_seeds_are_all_different() -> None:
    seeds = Counter(step_seed(s, t, r) for s in range(5) for t in range(200) for r in range(4))
    assert len(seeds) == 4000
    assert all(0 <= s < 2**64 for s in seeds)
    assert step_seed(1, 2, 3) == step_seed(1, 2, 3)


# ---------------------------------------------------------------- against a loop written out


def plain_loop(config: TrainingConfig) -> tuple[Tiny, list[Tensor], list[float]]:
    """Train by torch alone; return the raw model, its EMA parameters, and the loss of every step."""
    model = tiny()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer: Any = torch.optim.AdamW(groups, betas=config.betas)
    average = [p.detach().clone() for p in parameters]
    losses = []
    model.train()
    for step in range(config.num_steps):
        batch = toy_data()[batch_indices(NUM_IMAGES, config.batch_size, config.seed, step).tolist()]
        torch.manual_seed(step_seed(config.seed, step, 0))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        optimizer.zero_grad()
        loss = toy_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        decay = min(config.ema_decay, (1 + step) / (10 + step)) if step else 0.0
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, parameters, strict=True)]
    return model, average, losses


def test_training_is_the_plain_loop_with_ema(uninterrupted: tuple[Tiny, dict[str, Any], Path]) -> None:
    """The weights end as the EMA of AdamW's, and the curve is the mean loss of 20 steps.

    The tolerance is float32 rounding (6e-8 relative a step) carried through 70 steps of Adam, whose division by
    small second moments can enlarge it; observed 1e-7. One step more or less moves weights by 1e-3.
    """
    model, log, folder = uninterrupted
    raw, average, losses = plain_loop(CONFIG)
    for ours, expected in zip(model.parameters(), average, strict=True):
        torch.testing.assert_close(ours.detach(), expected, rtol=0, atol=1e-5)
    expected_curve = [(s, np.mean(losses[s - 20 : s])) for s in (20, 40, 60)] + [(70, np.mean(losses[60:]))]
    assert [s for s, _ in log["loss"]] == [20, 40, 60, 70]
    assert [v for _, v in log["loss"]] == pytest.approx([v for _, v in expected_curve], rel=1e-5)

    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    for ours, shadow in zip(model.parameters(), state["ema"]["shadow_params"], strict=True):
        assert torch.equal(ours.detach(), shadow)
    for name, expected in raw.state_dict().items():
        torch.testing.assert_close(state["model"][name], expected, rtol=0, atol=1e-5)
    distance = max((a - b).abs().max() for a, b in zip(average, raw.parameters(), strict=True))
    assert distance > 1e-3  # so that the tolerance above tells EMA weights from raw ones


def test_what_training_leaves(uninterrupted: tuple[Tiny, dict[str, Any], Path]) -> None:
    model, log, folder = uninterrupted
    assert not model.training
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "loss.json", "loss.png"]
    written = json.loads((folder / "loss.json").read_text())
    assert written == json.loads(json.dumps(log))
    assert written["config"] == json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    assert written["num_images_seen"] == 70 * 8
    assert written["num_parameters"] == sum(p.numel() for p in model.parameters())
    with Image.open(folder / "loss.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors() or []) > 2  # something is drawn


def test_loss_falls(tmp_path: Path) -> None:
    _, log = fit(tmp_path, num_steps=200, warmup_steps=10)
    assert log["loss"][-1][1] < 0.6 * log["loss"][0][1]


# ---------------------------------------------------------------- determinism


def test_same_seed_same_weights(uninterrupted: tuple[Tiny, dict[str, Any], Path], tmp_path: Path) -> None:
    model, log, _ = uninterrupted
    again, log_again = fit(tmp_path)
    assert weights(again) == weights(model)
    assert log_again["loss"] == log["loss"]


def test_other_seed_other_weights(uninterrupted: tuple[Tiny, dict[str, Any], Path], tmp_path: Path) -> None:
    assert weights(fit(tmp_path, seed=1)[0]) != weights(uninterrupted[0])


# ---------------------------------------------------------------- kill and resume

# Right after a checkpoint, and at steps drawn without regard to the period of checkpoints.
KILL_STEPS = (21, *np.random.default_rng(2026).integers(1, 70, 2).tolist())
KILLS = ("outside", "saving", *KILL_STEPS)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(folder: Path, kill: str | int) -> None:
    """Train in this process, which dies: when the loss of a step is due, in the middle of saving, or from outside."""
    calls = 0

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == kill:
            die()
        if kill == "outside":
            time.sleep(0.02)
        return toy_loss(model, batch)

    if kill == "saving":
        original = torch.save

        def save(state: dict[str, Any], path: Path) -> None:
            original(state, path)
            if state["step"] == 40:
                path.write_bytes(path.read_bytes()[:1000])
                die()

        vars(torch)["save"] = save  # this process ends here, so nothing is put back
    fit(folder, loss=loss)


def fork_and_kill(root: Path) -> None:
    """Kill one training for each of `KILLS`. Runs in a process of its own, with one thread, so that fork is safe."""
    torch.set_num_threads(1)
    toy_data()
    fit(root / "warm-up", num_steps=1)  # imports what training needs once, not in every child
    for kill in KILLS:
        folder = root / str(kill)
        child = os.fork()
        if child == 0:
            run_until_killed(folder, kill)
            os._exit(0)
        if kill == "outside":
            while not (folder / "checkpoint.pt").exists():
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{kill}: the training ended before it was killed"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    code = "import sys, pathlib, test_training; test_training.fork_and_kill(pathlib.Path(sys.argv[1]))"
    # The environment names the folder of the tests' own modules, which pytest put on its path.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", code, str(root)], env=environment, check=True, timeout=120)
    return root


@pytest.mark.parametrize("kill", KILLS)
def test_killed_and_resumed_is_as_uninterrupted(
    killed: Path, uninterrupted: tuple[Tiny, dict[str, Any], Path], kill: str | int
) -> None:
    folder = killed / str(kill)
    assert not (folder / "loss.json").exists()
    saved = folder / "checkpoint.pt"
    if kill == "outside":
        # Slow enough (20 ms a step) that it dies in the first interval, or shortly after.
        assert torch.load(saved, weights_only=True)["step"] < 70
    elif kill == "saving":
        assert torch.load(saved, weights_only=True)["step"] == 20  # the half-written one is elsewhere
    else:
        assert isinstance(kill, int)
        assert saved.exists() == (kill > 20)

    steps = 0

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal steps
        steps += 1
        return toy_loss(model, batch)

    begun = torch.load(saved, weights_only=True)["step"] if saved.exists() else 0
    torch.manual_seed(99)  # the state of the generator must not matter
    model, log = fit(folder, loss=loss)
    assert steps == 70 - begun
    assert weights(model) == weights(uninterrupted[0])
    assert log["loss"] == uninterrupted[1]["loss"]


def test_resuming_ignores_the_given_weights(tmp_path: Path) -> None:
    """A finished run is not trained further: it gives its weights back, whatever the model was."""
    first, log = fit(tmp_path)
    torch.manual_seed(77)
    other = Tiny()
    again = train(other, toy_data(), poisoned, CONFIG, tmp_path, show_progress=False)
    assert weights(other) == weights(first)
    assert again["loss"] == log["loss"]


def test_checkpoints_fall_on_points_of_the_curve() -> None:
    """Else a resumed curve would lack the losses since its last point, and a NaN could be saved unseen."""
    with pytest.raises(ValueError, match="checkpoint_every must be a multiple of 20, not 15"):
        TrainingConfig(num_steps=70, checkpoint_every=15)


def poisoned(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    raise AssertionError("must not be called")


def interrupted_at(step: int) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    calls = iter(range(1, step + 1))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if next(calls) == step:
            raise KeyboardInterrupt
        return toy_loss(model, batch)

    return loss


# ---------------------------------------------------------------- refusals


@pytest.fixture
def finished(uninterrupted: tuple[Tiny, dict[str, Any], Path], tmp_path: Path) -> Path:
    """Return a folder with the checkpoint of the uninterrupted run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes((uninterrupted[2] / "checkpoint.pt").read_bytes())
    return tmp_path / "run"


@pytest.mark.parametrize("change", [{"learning_rate": 5e-3}, {"num_steps": 80}, {"seed": 3}, {"batch_size": 4}])
def test_checkpoint_of_other_settings_is_refused(finished: Path, change: dict[str, Any]) -> None:
    before = (finished / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.pt belongs to another run"):
        fit(finished, **change)
    assert (finished / "checkpoint.pt").read_bytes() == before


def test_checkpoint_of_another_model_is_refused(finished: Path) -> None:
    class Wider(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)

    with pytest.raises(ValueError, match="belongs to another run"):
        train(Wider(), toy_data(), toy_loss, CONFIG, finished, show_progress=False)


def test_checkpoint_of_other_data_is_refused(finished: Path) -> None:
    fewer = toy_data().select(range(NUM_IMAGES - 1))
    with pytest.raises(ValueError, match="belongs to another run"):
        train(tiny(), fewer, toy_loss, CONFIG, finished, show_progress=False)


def test_checkpoint_of_as_many_other_images_is_refused(finished: Path) -> None:
    other = toy_data(NUM_IMAGES + 1).select(range(1, NUM_IMAGES + 1))
    assert len(other) == NUM_IMAGES
    with pytest.raises(ValueError, match="belongs to another run"):
        train(tiny(), other, toy_loss, CONFIG, finished, show_progress=False)


def weighted_loss(model: nn.Module, batch: dict[str, Tensor], *, weight: float) -> Tensor:
    return weight * toy_loss(model, batch)


def test_checkpoint_of_another_loss_is_refused(tmp_path: Path) -> None:
    """Settings of the loss (`functools.partial`, as in experiment.py) are settings of the run."""
    fit(tmp_path, num_steps=20, loss=functools.partial(weighted_loss, weight=1.0))
    with pytest.raises(ValueError, match="belongs to another run"):
        fit(tmp_path, num_steps=20, loss=functools.partial(weighted_loss, weight=2.0))


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_truncated_checkpoint_is_one_clear_error(finished: Path, keep: float) -> None:
    path = finished / "checkpoint.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        fit(finished)


def step_of_the_far_future(state: dict[Any, Any]) -> None:
    state["step"] = 10**9


def keys_that_are_numbers(state: dict[Any, Any]) -> None:
    state["model"] = dict(enumerate(state["model"].values()))


def one_weight_less(state: dict[Any, Any]) -> None:
    state["ema"]["shadow_params"].pop()


def moments_of_another_shape(state: dict[Any, Any]) -> None:
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)


def one_flipped_bit(state: dict[Any, Any]) -> None:
    state["model"]["linear.bias"].view(torch.uint8)[0] ^= 1


def more_values_than_there_are(state: dict[Any, Any]) -> None:
    state["model"]["linear.bias"] = torch.zeros(1).expand(2**40)


def empty(state: dict[Any, Any]) -> None:
    state.clear()


@pytest.mark.parametrize(
    "change",
    [
        *(step_of_the_far_future, keys_that_are_numbers, one_weight_less, moments_of_another_shape, one_flipped_bit),
        *(more_values_than_there_are, empty),
    ],
)
@pytest.mark.parametrize("with_hash", [False, True])
def test_changed_checkpoint_is_one_clear_error(
    finished: Path, change: Callable[[dict[Any, Any]], None], with_hash: bool
) -> None:
    """Whatever field was changed; with the hash made anew, too, except for what only the hash can tell."""
    path = finished / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    if with_hash:
        if change in (one_flipped_bit, more_values_than_there_are):
            return
        state.pop("sha256", None)
        save_state(path, state)
    else:
        torch.save(state, path)
    with pytest.raises(UserError, match=r"checkpoint\.pt (belongs to another run|is|has|cannot be read as a)"):
        fit(finished, num_steps=70)


def test_pipe_in_the_place_of_the_checkpoint_is_not_waited_for(finished: Path) -> None:
    (finished / "checkpoint.pt").unlink()
    os.mkfifo(finished / "checkpoint.pt")
    with pytest.raises(UserError, match=r"no regular file\. Remove it"):
        fit(finished)


def diverging_at(step: int) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    calls = iter(range(1, 1000))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return toy_loss(model, batch) * (math.nan if next(calls) == step else 1)

    return loss


def test_nan_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="loss of model became nan by step 60"):
        fit(tmp_path, loss=diverging_at(43), checkpoint_every=20)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 40
    assert all(value.isfinite().all() for value in state["model"].values())
    assert not (tmp_path / "loss.json").exists()


# ---------------------------------------------------------------- clipping and progress


@pytest.fixture
def gradient_norms() -> Iterator[list[float]]:
    """Collect the gradient norm that each optimiser step sees."""
    norms: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))

    from torch.optim.optimizer import register_optimizer_step_pre_hook

    handle = register_optimizer_step_pre_hook(note)
    yield norms
    handle.remove()


@pytest.mark.parametrize(("scale", "clipped"), [(1e3, True), (1e-3, False)])
def test_gradients_are_clipped(tmp_path: Path, gradient_norms: list[float], scale: float, clipped: bool) -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return scale * toy_loss(model, batch)

    fit(tmp_path, loss=loss, num_steps=20, max_grad_norm=0.5)
    assert len(gradient_norms) == 20
    if clipped:  # torch divides by norm + 1e-6, in float32
        assert gradient_norms == pytest.approx([0.5] * 20, rel=1e-5)
    else:
        assert max(gradient_norms) < 0.1


def test_lines_of_progress_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0)
    train(tiny(), toy_data(), toy_loss, CONFIG, tmp_path / "a", name="toy")
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("train toy: ")]
    assert [line.split(",")[0] for line in lines] == [f"train toy: step {s} of 70" for s in (20, 40, 60, 70)]
    assert lines[-1].endswith("0.0 min left")

    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 3600)
    train(tiny(), toy_data(), toy_loss, CONFIG, tmp_path / "b", name="toy")
    assert "step 70 of 70" in capsys.readouterr().err  # the last one always
    train(tiny(), toy_data(), toy_loss, CONFIG, tmp_path / "c", name="toy", show_progress=False)
    assert "step" not in capsys.readouterr().err


# ---------------------------------------------------------------- latents


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    torch.manual_seed(3)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    ).eval()


def pictures(count: int, *, labelled: bool = True) -> Dataset:
    rng = np.random.default_rng(1)
    images = [Image.fromarray(x) for x in rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)]
    columns: dict[str, Any] = {"image": images}
    if labelled:
        columns["label"] = [i % 3 for i in range(count)]
    return Dataset.from_dict(columns)


def direct_moments(autoencoder: AutoencoderKL, images: Dataset, *, mirrored: bool = False) -> Tensor:
    """Encode images one after another, without any of the code under test."""
    pixels = torch.stack([torch.tensor(np.asarray(image)) for image in images["image"]])
    values = (pixels.float() / 255 * 2 - 1)[:, None]
    with torch.no_grad():
        parts = [autoencoder.encode(x[None]).latent_dist for x in (values.flip(3) if mirrored else values)]
    return torch.cat([torch.cat([part.mean, part.logvar], dim=1) for part in parts])


# Images in another batch, and pixels / 255 * 2 - 1 for pixels / 127.5 - 1: rounding of float32 activations of
# order 1 through ten layers, observed 2e-6. The latents of two images differ by more than 1e-2.
ENCODED = 1e-4


def test_latents_are_the_autoencoders(autoencoder: AutoencoderKL, tmp_path: Path) -> None:
    images = pictures(7)
    table = cache_latents(autoencoder, images, tmp_path / "latents", channels=1, batch_size=3)
    assert sorted(table.column_names) == ["label", "moments", "moments_mirrored"]
    rows = table[:]
    assert rows["moments"].shape == rows["moments_mirrored"].shape == (7, 8, 4, 4)
    assert rows["moments"].dtype == torch.float32
    assert rows["label"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    for name, mirrored in (("moments", False), ("moments_mirrored", True)):
        expected = direct_moments(autoencoder, images, mirrored=mirrored)
        torch.testing.assert_close(rows[name], expected, rtol=0, atol=ENCODED)
    assert (rows["moments"] - rows["moments_mirrored"]).abs().max() > 100 * ENCODED
    assert (rows["moments"][0] - rows["moments"][1]).abs().max() > 100 * ENCODED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents"]


def test_latents_without_mirror_and_labels(autoencoder: AutoencoderKL, tmp_path: Path) -> None:
    images = pictures(3, labelled=False)
    table = cache_latents(autoencoder, images, tmp_path / "latents", channels=1, with_mirrored=False)
    assert table.column_names == ["moments"]


def test_latents_of_cropped_images(autoencoder: AutoencoderKL, tmp_path: Path) -> None:
    table = cache_latents(autoencoder, pictures(2), tmp_path / "latents", image_size=4, channels=1)
    assert table[:]["moments"].shape == (2, 8, 2, 2)


class Poisoned(nn.Module):
    """An autoencoder that must not be asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, images: Tensor) -> None:
        raise OSError("encoded")


def test_latents_are_loaded_the_second_time(autoencoder: AutoencoderKL, tmp_path: Path) -> None:
    images = pictures(5)
    first = cache_latents(autoencoder, images, tmp_path / "latents", channels=1)[:]
    again = cache_latents(Poisoned(), images, tmp_path / "latents", channels=1)[:]
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_damaged_latents_are_one_clear_error(autoencoder: AutoencoderKL, tmp_path: Path) -> None:
    cache_latents(autoencoder, pictures(5), tmp_path / "latents", channels=1)
    with pytest.raises(UserError, match=r"latents cannot be read .* it has 5 rows for 6 images"):
        cache_latents(Poisoned(), pictures(6), tmp_path / "latents", channels=1)
    (arrow,) = (tmp_path / "latents").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"latents cannot be read as a table of encoded images; remove it"):
        cache_latents(Poisoned(), pictures(5), tmp_path / "latents", channels=1)


def test_latents_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="encoded"):
        cache_latents(Poisoned(), pictures(5), tmp_path / "latents", channels=1)
    assert list(tmp_path.iterdir()) == []


def test_generator_takes_cached_latents(autoencoder: AutoencoderKL, tmp_path: Path) -> None:
    table = cache_latents(autoencoder, pictures(6), tmp_path / "latents", channels=1)
    model = tiny_model(num_levels=8)

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return generator_loss(model, sample_posterior(batch["moments"]), batch["label"])

    config = TrainingConfig(num_steps=3, batch_size=4, warmup_steps=1)
    log = train(model, table, loss, config, tmp_path / "run", show_progress=False)
    assert 0 < log["loss"][-1][1] < 3 * math.log(8)  # about that of guessing among 8 levels
