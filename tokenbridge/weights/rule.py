"""Random weights that are drawn by a fixed rule, so that every language and machine draws the same ones."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenbridge.utils.errors import UserError
from tokenbridge.weights.official import Layout

RULE = "fan-in-normal-v1"


def rule_state(layout: Layout, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Draw the tensors of an official state dict, except its buffers, with `draw_rule`."""
    return draw_rule({name: mapping.shape for name, mapping in layout.mappings.items()}, weights)


def draw_rule(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Draw float32 weights, each tensor from a seed made of the salt and its official name.

    Matrices and kernels are normal with variance 1 / fan-in. Vectors are normal with deviation 0.1, around 1 if their
    name ends with "weight" or "scale", and around 0 otherwise.

    Args:
        shapes: official name to shape.
        weights: {"rule": "fan-in-normal-v1", "salt": text}, as golden cases record it.
    """
    if weights.get("rule") != RULE or "salt" not in weights:
        raise UserError(f"Unknown rule for weights {dict(weights)}; the only rule is {RULE!r}, with a salt.")

    def draw(name: str) -> Tensor:
        seed = zlib.crc32(f"{weights['salt']}/{name}".encode())
        shape = shapes[name]
        # The rule is defined by numpy's legacy generator, which lets other threads run while it draws.
        x = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
        if x.ndim >= 2:
            x /= np.float32(math.sqrt(math.prod(shape[1:])))
        else:
            x *= np.float32(0.1)
            x += np.float32(name.endswith(("weight", "scale")))
        return torch.from_numpy(x)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(shapes, pool.map(draw, shapes), strict=True))
