"""The training loop of all models: autoencoders, classifier and generators.

The loop uses AdamW with warm-up and cosine decay, gradient clipping, and an exponential moving average (EMA) of the
weights (diffusers' EMAModel). accelerate manages devices, processes and mixed precision.

Every random draw of a step (images, noise, masks, dropout) is a function of (seed, step, rank). A run that is killed
and resumed therefore produces the same weights as one that was not, and the state of no generator needs to be saved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenbridge.configs.schema import LOG_EVERY, TRAINING_LOG, TrainingConfig
from tokenbridge.utils import console
from tokenbridge.utils.errors import DivergedError, UserError, reading
from tokenbridge.utils.files import replacing, write_json
from tokenbridge.utils.states import read_state, save_state

CHECKPOINT, LOGS = "checkpoint.pt", (TRAINING_LOG, "loss.png")  # the files of a run

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset

    Batch = dict[str, Tensor]
    Loss = Callable[[nn.Module, Batch], Tensor]
    """Loss of a model on one batch: a scalar tensor to minimise."""


class _Step(nn.Module):
    """A model and its loss in one module, so that accelerate wraps the whole step, whatever the loss calls."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch) -> Tensor:
        """Return the scalar loss."""
        return self.loss(self.model, batch)


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of a step: linear warm-up from 0, then half a cosine down to 0 at `num_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return an independent 64-bit seed for every (seed, step, rank)."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def batch_indices(num_images: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the indices [batch_size] of the images of one step.

    Every pass over the images has a permutation of its own, which is cut into consecutive batches. A batch that
    extends beyond the end of a pass takes its remaining images from the next permutation.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    passes = places // num_images
    orders = {p: np.random.default_rng((seed, int(p))).permutation(num_images) for p in np.unique(passes)}
    return np.array([orders[p][i] for p, i in zip(passes, places % num_images, strict=True)])


def train(
    model: nn.Module,
    dataset: Dataset,
    loss: Loss,
    config: TrainingConfig,
    folder: Path | str,
    *,
    name: str = "model",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Train `model` in place, so that it has its EMA weights at the end.

    The function writes `checkpoint.pt`, from which a run is resumed, `loss.json` and `loss.png` to `folder`.

    Args:
        dataset: rows of tensors (`with_format("torch")`); a batch is a dict of stacked columns.
        loss: a function from (model, batch) to a scalar, which may draw from torch's global generator.
        folder: a folder that holds no checkpoint, or one of the same run, which is then resumed.
        name: name of the model in the progress bar, the plot and messages.
        show_progress: show the progress on stderr.

    Returns:
        The training log: configuration, loss curve [(step, loss)], seconds and device.

    Raises:
        UserError: the folder holds a checkpoint of another run, or the processes cannot share a batch equally.
        DivergedError: the loss became NaN or infinite; the last checkpoint is kept.
    """
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    folder = Path(folder)
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer: Any = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=config.betas,
    )
    if config.batch_size % accelerator.num_processes:
        raise UserError(f"{accelerator.num_processes} processes cannot share a batch of {config.batch_size} images.")
    step_loss, optimizer = accelerator.prepare(_Step(model, loss), optimizer)
    ema = EMAModel(list(model.parameters()), decay=config.ema_decay)
    ema.to(accelerator.device)

    fingerprint = _fingerprint(model, dataset, loss, config)
    checkpoint = folder / CHECKPOINT
    first_step, curve, seconds = _resume(checkpoint, fingerprint, model, optimizer, ema, config.num_steps)

    rank, world_size = accelerator.process_index, accelerator.num_processes
    progress = console.progress(
        f"train {name}",
        config.num_steps,
        "step {done} of {total}",
        "{note}, {minutes:.1f} min left",
        first=first_step,
        show=show_progress and accelerator.is_main_process,
    )
    start = time.perf_counter()
    model.train()
    recent: list[Tensor] = []
    with progress as advance:
        for step in range(first_step, config.num_steps):
            rows = batch_indices(len(dataset), config.batch_size, config.seed, step)[rank::world_size]
            batch = {key: value.to(accelerator.device) for key, value in dataset[rows.tolist()].items()}
            torch.manual_seed(step_seed(config.seed, step, rank))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config)
            value = step_loss(batch)
            accelerator.backward(value)
            accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.step(model.parameters())
            recent.append(value.detach())

            done = step + 1
            if done % LOG_EVERY == 0 or done == config.num_steps:
                mean = accelerator.reduce(
                    torch.stack(recent).mean(), "mean"
                ).item()  # only here the loop waits for the device
                recent.clear()
                if not math.isfinite(mean):
                    raise DivergedError(f"The loss of {name} became {mean} by step {done}.")
                curve.append((done, mean))
                advance(done, f"loss {mean:.4f}")
            if done % config.checkpoint_every == 0 or done == config.num_steps:
                total = seconds + time.perf_counter() - start
                if accelerator.is_main_process:
                    _save(checkpoint, fingerprint, model, optimizer, ema, done, curve, total)
                accelerator.wait_for_everyone()
    ema.copy_to(model.parameters())
    model.eval()
    log = {
        "config": dataclasses.asdict(config),
        "num_images_seen": config.num_steps * config.batch_size,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds + time.perf_counter() - start, 1),
        "device": str(accelerator.device),
        "loss": curve,
    }
    if accelerator.is_main_process:
        write_json(folder / LOGS[0], log)
        _plot(folder / LOGS[1], curve, name)
    return log


def _fingerprint(model: nn.Module, dataset: Dataset, loss: Loss, config: TrainingConfig) -> str:
    """Return a hash of the model's shapes and settings, the loss's settings and the data of the first step."""
    shapes = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    model_config = dict(getattr(model, "config", {}))
    settings = [shapes, model_config, getattr(loss, "keywords", {}), len(dataset), dataclasses.asdict(config)]
    digest = hashlib.sha256(json.dumps(settings, default=str).encode())
    first = dataset[batch_indices(len(dataset), config.batch_size, config.seed, 0).tolist()]
    for name, value in sorted(first.items()):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save(
    path: Path,
    fingerprint: str,
    model: nn.Module,
    optimizer: Any,
    ema: Any,
    step: int,
    curve: list[tuple[int, float]],
    seconds: float,
) -> None:
    state = {
        "fingerprint": fingerprint,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict(),
        "step": step,
        "curve": curve,
        "seconds": seconds,
    }
    save_state(path, state)


def _resume(
    path: Path, fingerprint: str, model: nn.Module, optimizer: Any, ema: Any, num_steps: int
) -> tuple[int, list[tuple[int, float]], float]:
    """Load the checkpoint if it exists; return the next step, and the loss curve and the seconds so far."""
    if not path.exists():
        return 0, [], 0.0
    what, remedy = "a checkpoint of a training", "Remove it to start again."
    state = read_state(path, what, remedy)
    if state.get("fingerprint") != fingerprint:
        raise UserError(
            f"{path} belongs to another run (with another model, data or settings). "
            "Train into an empty folder, or remove that checkpoint."
        )
    with reading(path, what):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        ema.to(next(model.parameters()).device)
        for parameter, average in zip(model.parameters(), ema.shadow_params, strict=True):
            moments = [moment for moment in optimizer.state[parameter].values() if moment.ndim]
            if any(value.shape != parameter.shape for value in (average, *moments)):
                raise UserError(f"{path} has tensors of other shapes than the model's. {remedy}")
        curve = [(int(step), float(value)) for step, value in state["curve"]]
        if not 0 < state["step"] == curve[-1][0] <= num_steps:
            raise UserError(f"{path} is at step {state['step']} of {num_steps}. {remedy}")
        return state["step"], curve, float(state["seconds"])


def _plot(path: Path, curve: list[tuple[int, float]], name: str) -> None:
    """Write a plot of the loss curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve, strict=True), linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss", title=f"Training loss of {name}")
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
