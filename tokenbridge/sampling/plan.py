"""What a sampling run will take, before it runs: operations, hours, disk."""

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
    """A sampling run, estimated."""

    name: str
    num_images: int
    num_iterations: int
    flop_per_image: dict[str, float]  # by part
    device: str
    dtype: str
    num_processes: int
    matmul_flop_per_second: float  # measured now, in one process
    disk_bytes: int  # at most, uncompressed
    free_bytes: int
    missing: tuple[str, ...]  # what must be had before the run can start

    @property
    def hours(self) -> float:
        """Hours at the speed of a large matrix product: a lower bound, since sampling is slower than that."""
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
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as lines of a table: what, and how much."""
        tflop = {part: f"{flop / 1e12:.3g}" for part, flop in self.flop_per_image.items()}
        total = sum(self.flop_per_image.values()) / 1e12
        speed = f"{self.matmul_flop_per_second / 1e12:.3g} TFLOP/s"
        enough = "" if self.disk_bytes < self.free_bytes else ": NOT ENOUGH"
        return [
            ("images", f"{self.num_images:,}"),
            ("iterations", str(self.num_iterations)),
            ("TFLOP per image", f"{total:.4g} ({', '.join(f'{part} {n}' for part, n in tflop.items())})"),
            ("device", f"{self.num_processes} × {self.device}, {self.dtype}: {speed} in a large product, measured now"),
            ("hours, estimated", f"at least {self.hours:.3g}, at that speed; sampling reaches a part of it"),
            ("disk", f"at most {self.disk_bytes / 2**30:.3g} GiB; {self.free_bytes / 2**30:.3g} GiB are free{enough}"),
            *(("missing", line) for line in self.missing),
            *([] if self.missing else [("missing", "nothing")]),
        ]


def plan_run(
    model: NamedModel,
    config: RunConfig,
    folder: Path,
    *,
    device: torch.device,
    dtype: str,
    num_processes: int,
    missing: Sequence[str],
) -> Plan:
    """Estimate a run; nothing is loaded or written.

    Args:
        model: what will make the images.
        config: of the run.
        folder: where the images will go.
        device: where it will run; a matrix product is timed there.
        dtype: fp32, bf16 or fp16, of that product.
        num_processes: that share the work.
        missing: what must be had before the run can start, a line each.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    # An .npz has three channels, and while it is put together its parts are there too.
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
    )


@functools.cache  # the plans of one command are compared with each other
def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of a large square matrix product: the best of a few, after a warm-up."""
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
