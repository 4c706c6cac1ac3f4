"""The device and the processes of a run, number types, peak memory."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Literal

import torch
from accelerate import PartialState

Dtype = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def process_state() -> PartialState:
    """Return this process's place among those of the run: alone, or as torchrun or accelerate launched it."""
    # Processes wait for one another at the ends only, and then for as long as the slowest takes.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


def peak_memory() -> int:
    """Return the bytes this process has held at most: on its GPU, or else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
