"""Drawing tokens from logits, and checking class labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenbridge.utils.errors import UserError

ChooseTokens = Callable[[Tensor, int], Tensor]
"""Choose tokens [N] from logits [N, V] of the i-th channel (greedy, or by random numbers of the run)."""


def token_chooser(
    temperature: float, uniforms: Tensor | None, keep: Callable[[Tensor], Tensor] | None = None
) -> ChooseTokens:
    """Return the function that chooses tokens: the inverse of the cumulative distribution at uniforms [N, C].

    Without uniforms: what torch.multinomial draws from the global stream, without its wait for the device.
    `keep`, if given, sets logits [N, V] to -inf after they were divided by the temperature, for top-k and the like.
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
        threshold = uniforms[:, place, None] * cumulative[:, -1:]  # rounding: the sum is not exactly 1
        return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)

    return choose


def check_labels(labels: Tensor, batch: int, num_classes: int) -> None:
    """Refuse labels of other classes, or not one for each image.

    Raises:
        ValueError: so.
    """
    if list(labels.shape) != [batch]:
        raise UserError(f"There must be one label for each of {batch} images, not labels {list(labels.shape)}.")
    if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < num_classes):
        raise UserError(
            f"Class labels span [{int(labels.min())}, {int(labels.max())}], "
            f"but the model has the classes 0 to {num_classes - 1}."
        )
