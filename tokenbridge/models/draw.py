"""Drawing tokens from logits, and checking class labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenbridge.utils.errors import UserError

ChooseTokens = Callable[[Tensor, int], Tensor]
"""A function that takes logits [N, V] and the index of their channel or position, and returns tokens [N]."""


def token_chooser(
    temperature: float, uniforms: Tensor | None, keep: Callable[[Tensor], Tensor] | None = None
) -> ChooseTokens:
    """Return a function that draws tokens from logits.

    Args:
        temperature: divides the logits; at 0 the most likely token is chosen.
        uniforms: random numbers [N, C] in [0, 1), at which the cumulative distribution of each channel or position is
            inverted. If None, the function draws what torch.multinomial would draw from the global stream, but does
            not wait for the device.
        keep: a filter such as top-k, which sets logits [N, V] to -inf after the division by the temperature.
    """
    if temperature == 0:
        return lambda logits, place: logits.argmax(-1)

    def probabilities(logits: Tensor) -> Tensor:
        logits = logits.float()
        scaled = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0 at any temperature
        return (scaled if keep is None else keep(scaled)).softmax(-1)

    def race(logits: Tensor, place: int) -> Tensor:
        p = probabilities(logits)
        return (p / torch.empty_like(p).exponential_()).argmax(-1)

    if uniforms is None:
        return race

    def choose(logits: Tensor, place: int) -> Tensor:
        cumulative = probabilities(logits).cumsum(-1)
        threshold = uniforms[:, place, None] * cumulative[:, -1:]  # because of rounding, the sum is not exactly 1
        return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)

    return choose


def check_labels(labels: Tensor, batch: int, num_classes: int) -> None:
    """Check that there is one label for each image of a batch, and that each is in [0, num_classes).

    Raises:
        UserError: the number of labels is wrong, or a label is out of range.
    """
    if list(labels.shape) != [batch]:
        raise UserError(f"There must be one label for each of {batch} images, not labels {list(labels.shape)}.")
    if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < num_classes):
        raise UserError(
            f"Class labels span [{int(labels.min())}, {int(labels.max())}], "
            f"but the model has the classes 0 to {num_classes - 1}."
        )
