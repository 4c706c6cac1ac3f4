"""Estimates of the operations, the hours and the disk space of a sampling run, made before it starts."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenbridge.sampling.config import RunConfig
from tokenbridge.sampling.load import NamedModel
from tokenbridge.utils.devices import DTYPES


@dataclass(frozen=True)
class Plan:
    """The estimate of a sampling run."""

    name: str
    num_images: int
    num_iterations: int
    flop_per_image: dict[str, float]  # by part
    device: str
    dtype: str
    num_processes: int
    matmul_flop_per_second: float  # measured now, in one process
    disk_bytes: int  # an upper bound, for uncompressed images
    free_bytes: int
    missing: tuple[str, ...]  # a line for each file that the run needs and that is missing
    next: tuple[str, ...]  # the commands that fetch them

    @property
    def hours(self) -> float:
        """The hours at the speed of a large matrix product, a lower bound because sampling is slower than that."""
        flop = sum(self.flop_per_image.values()) * self.num_images
        return flop / self.matmul_flop_per_second / self.num_processes / 3600

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "model": self.name,
            "num_images": self.num_images,
            "num_iterations": self.num_iterations,
            "tflop_per_image": {
                **{part: round(flop / 1e12, 4) for part, flop in self.flop_per_image.items()},
                "total": round(sum(self.flop_per_image.values()) / 1e12, 4),
            },
            "device": self.device,
            "dtype": self.dtype,
            "num_processes": self.num_processes,
            "matmul_tflop_per_second": round(self.matmul_flop_per_second / 1e12, 4),
            "estimated_hours_at_least": float(f"{self.hours:.3g}"),
            "disk_gib_at_most": round(self.disk_bytes / 2**30, 3),
            "free_gib": round(self.free_bytes / 2**30, 3),
            "missing": list(self.missing),
            "next": list(self.next),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as rows of a table, each with a name and a value."""
        tflop = {part: f"{flop / 1e12:.3g}" for part, flop in self.flop_per_image.items()}
        total = sum(self.flop_per_image.values()) / 1e12
        speed = f"{self.matmul_flop_per_second / 1e12:.3g} TFLOP/s"
        hours = f"at least {hours_in_words(self.hours)} h at that speed, which sampling does not reach"
        enough = "" if self.disk_bytes < self.free_bytes else ": NOT ENOUGH"
        return [
            ("images", f"{self.num_images:,}"),
            ("iterations", str(self.num_iterations)),
            ("TFLOP per image", f"{total:.4g} ({', '.join(f'{part} {n}' for part, n in tflop.items())})"),
            ("device", f"{self.num_processes} × {self.device}, {self.dtype}: {speed} measured in a matrix product"),
            ("hours, estimated", hours),
            ("disk", f"at most {self.disk_bytes / 2**30:.3g} GiB; {self.free_bytes / 2**30:.3g} GiB are free{enough}"),
            *(("missing", line) for line in self.missing),
            *([] if self.missing else [("missing", "nothing")]),
            *(("next", command) for command in self.next),
        ]


def hours_in_words(hours: float) -> str:
    """Return hours as a plain number of at most three significant digits."""
    rounded = float(f"{hours:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.1f}" if rounded >= 0.1 else f"{rounded:.3f}"


def plan_run(
    model: NamedModel,
    config: RunConfig,
    folder: Path,
    *,
    device: torch.device,
    dtype: str,
    num_processes: int,
    missing: Sequence[str],
    next_commands: Sequence[str] = (),
) -> Plan:
    """Estimate a run without loading or writing anything.

    Args:
        folder: the folder of the run, which need not exist yet; the free space of its disk is reported.
        device: the device of the run; a matrix product is timed on it.
        dtype: precision of the run and of that product: fp32, bf16 or fp16.
        num_processes: number of processes that share the work.
        missing: a line for each file that the run needs and that is missing.
        next_commands: what fetches them.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    # An .npz has three channels, and its parts exist until it is assembled.
    copies = 2 * 3 // model.channels if config.format == "npz" else 1
    return Plan(
        name=model.name,
        num_images=config.num_images,
        num_iterations=model.num_iterations,
        flop_per_image=model.flop_per_image(),
        device=_name_of(device),
        dtype=dtype,
        num_processes=num_processes,
        matmul_flop_per_second=measure_matmul(device, DTYPES[dtype]),
        disk_bytes=copies * config.num_images * model.channels * model.image_size**2,
        free_bytes=shutil.disk_usage(there).free,
        missing=tuple(missing),
        next=tuple(next_commands),
    )


@functools.cache  # all plans of one command use the same speed, so that they can be compared
def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of a large square matrix product, the best of several runs."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        _wait(device)
        start = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
