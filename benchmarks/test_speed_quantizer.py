"""Time and memory of the quantiser, against computing the distances to all levels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.conftest import Report, SideBySide
from benchmarks.memory import nbytes, peak_memory
from tokenbridge.tokenizers.quantizer import GAUSSIAN_RANGE, gaussian_quantizer

SHAPE = (64, 16, 16, 16)
TIME_TARGET = 10.0  # times faster, at 64 levels
MEMORY_LIMIT = 2.0  # sizes of the input
SMALL = 4096  # bytes: scalars and the like


def by_distances(latents: Tensor, codebook: Tensor) -> Tensor:
    return reference.quantize(latents, codebook, value_range=GAUSSIAN_RANGE)


def latents(layout: str) -> Tensor:
    """Return latents of unit variance [B, C, h, w], or transposed to [B, L, C] as the generator's loss sees them."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return x if layout == "contiguous" else x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("num_levels", [16, 64])
def test_encode(side_by_side: SideBySide, num_levels: int) -> None:
    quantizer = gaussian_quantizer(num_levels)
    x = latents("contiguous")
    assert torch.equal(quantizer.encode(x), by_distances(x, quantizer.codebook))
    side_by_side(
        f"quantiser, {num_levels} levels",
        lambda: quantizer.encode(x),
        lambda: by_distances(x, quantizer.codebook),
        rounds=11,
        target=TIME_TARGET if num_levels == 64 else None,
    )


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_memory_of_encode(report: Report, layout: str) -> None:
    """The memory beside input and output is limited.

    Tokens are int64, so the output alone is twice as large as a float32 input. The table shows both numbers, with and
    without the output.
    """
    quantizer = gaussian_quantizer(64)
    x = latents(layout)
    ours = peak_memory(lambda: quantizer.encode(x))
    distances = peak_memory(lambda: by_distances(x, quantizer.codebook))
    for name, peak in ((f"quantiser, {layout}", ours), (f"distances, {layout}", distances)):
        limit = f"<= {MEMORY_LIMIT:g}" if peak is ours else ""
        sizes = (f"{peak.working / nbytes(x):.2f}", f"{peak.total / nbytes(x):.2f}")
        report.memory.append((name, *sizes, limit))
    limit_bytes = MEMORY_LIMIT * nbytes(x) + SMALL
    assert ours.working <= limit_bytes
    assert distances.working > limit_bytes  # mutation: the limit tells the two apart


def test_peak_memory_counts_what_it_should() -> None:
    size = 1 << 18

    def result_last() -> Tensor:
        first, second = torch.zeros(size), torch.ones(size)
        third = first + second
        del first, second
        return third + 1  # two at once

    peak = peak_memory(result_last)
    assert peak.total == 3 * 4 * size
    assert peak.working == 3 * 4 * size

    def result_first() -> Tensor:
        result = torch.zeros(size)
        result += torch.ones(size)
        return result

    peak = peak_memory(result_first)
    assert peak.total == 2 * 4 * size
    assert peak.working == 4 * size
