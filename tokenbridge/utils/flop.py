"""Operations, counted by torch where nothing is computed: on the meta device.

A multiply-add of a matrix product or convolution is two operations, and nothing else counts: no softmax, no
normalisation, and not the elementwise work of diffusion steps or of GIVT's rejection sampling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def count(function: Callable[[], object]) -> int:
    """Return the operations of one call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def placeholder(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor on the meta device, which has a shape and no values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def quadratic(function: Callable[[int], int]) -> Callable[[int], int]:
    """Return the polynomial of degree 2 through the values of `function` at 0, 1 and 2, exact at every integer.

    A transformer over n elements takes a + b n + c n^2 operations, so three counts give all others.
    """
    start, one, two = (function(n) for n in range(3))
    slope, curvature = one - start, two - 2 * one + start
    return lambda n: start + slope * n + curvature * (n * (n - 1) // 2)
