"""Number types, the device, and the peak memory of a run."""

from __future__ import annotations

import sys
from typing import Literal

import torch

Dtype = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_memory() -> int:
    """Return the peak memory of this process in bytes: that on its GPU if there is a GPU, otherwise main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
