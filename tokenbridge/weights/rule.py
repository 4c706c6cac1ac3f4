"""Weights drawn by a rule: the same in every language and on every machine."""

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
    """Draw an official state dict of this layout, without its buffers; see `draw_rule`."""
    return draw_rule({name: mapping.shape for name, mapping in layout.mappings.items()}, weights)


def draw_rule(shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Draw golden weights, float32; one tensor at a time for each thread.

    Args:
        shapes: by official name.
        weights: {"rule": "fan-in-normal-v1", "salt": ...}.

    Raises:
        ValueError: another rule.
    """
    if weights.get("rule") != RULE or "salt" not in weights:
        raise UserError(f"The rule for weights {dict(weights)} is unknown; there is {RULE!r}, with a salt.")

    def draw(name: str) -> Tensor:
        seed = zlib.crc32(f"{weights['salt']}/{name}".encode())
        shape = shapes[name]
        # The rule names numpy's legacy generator; it lets other threads run while it draws.
        x = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
        if x.ndim >= 2:
            x /= np.float32(math.sqrt(math.prod(shape[1:])))
        else:
            x *= np.float32(0.1)
            x += np.float32(name.endswith(("weight", "scale")))
        return torch.from_numpy(x)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(shapes, pool.map(draw, shapes), strict=True))
