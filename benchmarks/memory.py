"""Measure the memory of a function. torch's profiler records every allocation, also those inside an operator."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class PeakMemory:
    """Most bytes held at once during a call, without what existed before it."""

    total: int  # with the returned tensor
    working: int  # without the returned tensor, whenever it was allocated


def peak_memory(function: Callable[[], Tensor]) -> PeakMemory:
    """Measure a function that works on CPU tensors and returns a tensor that it has allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    address = result.untyped_storage().data_ptr()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    changes = [(e["args"]["Addr"], e["args"]["Bytes"]) for e in memory]
    # An address may be used several times. The result is the last allocation at its address.
    is_result = [a == address and size > 0 for a, size in changes]
    if not any(is_result):
        raise ValueError("The function returned a tensor that it did not allocate.")
    result_index = len(changes) - 1 - is_result[::-1].index(True)
    total = working = most_total = most_working = 0
    for i, (_, size) in enumerate(changes):
        total += size
        working += 0 if i == result_index else size
        most_total, most_working = max(most_total, total), max(most_working, working)
    return PeakMemory(most_total, most_working)


def nbytes(x: Tensor) -> int:
    """Return the size of a tensor's values."""
    return x.numel() * x.element_size()
