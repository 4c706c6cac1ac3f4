"""One training step of the tiny generator, with the loss on 4 positions of an image or on all masked ones.

A step consists of loss, gradients, clipping and AdamW. The loss on 4 positions estimates the loss on all and equals it
in expectation only, so the test compares it with the reference's loss of the same 4 positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.conftest import SideBySide
from benchmarks.models import make_model
from tokenbridge.configs.tiny import TINY
from tokenbridge.models.layers import take
from tokenbridge.models.tokenbridge.model import TokenBridge, generator_loss

RECIPE = TINY.recipe("tokenbridge-64")
SEED = 1  # the same draws, and so the same number of masked positions, in every round
RTOL, ATOL = 1e-4, 1e-6  # float32 sums in another order: at most 4e-8 seen, in gradients of up to 3e-2


def reference_loss(
    model: TokenBridge, latents: Tensor, labels: Tensor, *, num_loss_positions: int | None = None
) -> Tensor:
    """Return the loss of all masked positions, or of `num_loss_positions` of each image, by the reference path."""
    losses, masked, order = reference.token_losses(model, latents, labels)
    if num_loss_positions is None:
        return losses.mean()
    of_position = losses.new_zeros(*masked.shape, losses.shape[-1])
    of_position[masked] = losses
    return take(of_position, order[:, :num_loss_positions]).mean()


def gradients(model: TokenBridge, loss: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    torch.manual_seed(SEED)
    value = loss()
    value.backward()
    return value.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def training_step(model: TokenBridge, loss: Callable[[TokenBridge], Tensor]) -> Callable[[], None]:
    """Return a function that trains a copy of the model by one step."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        torch.manual_seed(SEED)
        loss(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@pytest.mark.parametrize("num_loss_positions", [RECIPE.loss["num_loss_positions"], None])
def test_training_step(side_by_side: SideBySide, num_loss_positions: int | None) -> None:
    model = make_model("tiny").train()
    batch = RECIPE.training.batch_size
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, model.num_channels, model.latent_size, model.latent_size, generator=generator)
    labels = torch.arange(batch) % model.num_classes

    ours, our_gradients = gradients(
        model, lambda: generator_loss(model, latents, labels, num_loss_positions=num_loss_positions)
    )
    theirs, their_gradients = gradients(
        model, lambda: reference_loss(model, latents, labels, num_loss_positions=num_loss_positions)
    )
    torch.testing.assert_close(ours, theirs, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(our_gradients, their_gradients, rtol=RTOL, atol=ATOL)

    side_by_side(
        f"training step, tiny, loss on {num_loss_positions or 'all masked'} positions",
        training_step(model, lambda m: generator_loss(m, latents, labels, num_loss_positions=num_loss_positions)),
        training_step(model, lambda m: reference_loss(m, latents, labels)),
        rounds=7,
    )
