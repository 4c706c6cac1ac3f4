"""Dimension-wise post-training quantisation of continuous latents (paper section 3.1, equations 1-5).

Every latent value is replaced, on its own, by the nearest of `num_levels` codebook values; its token is the index
of that value. Nothing is trained. There are three ways to make the codebook:

- `gaussian_quantizer` takes the conditional means of equal-probability bins of a Gaussian (the paper);
- `uniform_quantizer` takes the midpoints of bins of equal width (the paper's robustness remark);
- `lloyd_max_quantizer` takes the codebook of least squared error on calibration latents.

All three return a `ScalarQuantizer`, which encodes by searching the midpoints between sorted codebook values. The
official code (models/tokenbridge.py, `quantize`) computes all distances and takes the smallest, which gives the same
tokens but needs `num_levels` times the memory.

Shape letters: V levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from scipy import stats
from torch import Tensor, nn

from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable


GAUSSIAN_RANGE = 5.0  # a latent of this size is mapped to GAUSSIAN_SIGMAS before binning (official default)
GAUSSIAN_SIGMAS = 3.0  # the outermost bins are cut here, in standard deviations (official `std_range`)

SEARCH_BLOCK = 1 << 14  # values that the CPU looks up at a time, so that a block stays in its cache
MAX_CELLS = 1 << 16  # cells of the look-up table at most; 64 Gaussian levels need about 130


class ScalarQuantizer(nn.Module):
    """Map latents to tokens and back by the nearest value of a sorted codebook.

    The buffer `codebook`, float32 [V], is saved with `state_dict`.

    Args:
        codebook: strictly increasing values [V >= 2] in latent units.

    Raises:
        UserError: the values are not finite or do not strictly increase.
    """

    codebook: Tensor

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        codebook = codebook.detach().to(torch.float32).clone()
        assert codebook.ndim == 1, f"a codebook is [levels], not {list(codebook.shape)}"
        assert len(codebook) > 1, "a codebook has at least two levels"
        _check_codebook(codebook)
        self.register_buffer("codebook", codebook)

    @property
    def num_levels(self) -> int:
        """The number of codebook values, V."""
        return len(self.codebook)

    @property
    def midpoints(self) -> Tensor:
        """The boundaries [V - 1] between neighbouring levels."""
        return (self.codebook[:-1] + self.codebook[1:]) / 2

    def encode(self, latents: Tensor) -> Tensor:
        """Return the tokens of latents, int64 in [0, V) and of the same shape.

        Values outside the span of the codebook get the first or last token. A value half-way between two codebook
        values gets the lower token, as from the official argmin over distances.

        Args:
            latents: float tensor of any shape, in latent units. float64 is compared in float64, every other type in
                float32.

        Raises:
            UserError: a latent is NaN or infinite.
        """
        assert latents.is_floating_point(), f"latents must be floating point, not {latents.dtype}"
        if latents.numel() and not all(torch.isfinite(end) for end in latents.aminmax()):
            bad = int((~torch.isfinite(latents)).sum())
            raise UserError(f"{bad} of {latents.numel()} latents are NaN or infinite.")
        return self.nearest(latents)

    def nearest(self, latents: Tensor) -> Tensor:
        """Return the tokens without the checks of `encode`, for loops that must not wait for the device."""
        return _search(self.midpoints, latents)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the codebook values of tokens, float32 in latent units and of the same shape.

        Raises:
            UserError: a token is outside [0, V).
        """
        is_integer = not (tokens.is_floating_point() or tokens.dtype == torch.bool)
        assert is_integer, f"tokens must be integers, not {tokens.dtype}"
        if tokens.numel() and not ((tokens >= 0) & (tokens < self.num_levels)).all():
            low, high = int(tokens.min()), int(tokens.max())
            raise UserError(f"Tokens span [{low}, {high}], but there are {self.num_levels} levels.")
        return self.lookup(tokens)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the values without the checks of `decode`, for loops that must not wait for the device."""
        return self.codebook[tokens]

    def forward(self, latents: Tensor) -> Tensor:
        """Return the de-quantised latents, `decode(encode(latents))`."""
        return self.lookup(self.encode(latents))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> ScalarQuantizer:
        """Move the codebook with the model but keep float32, since half precision would give other tokens."""
        codebook = self.codebook
        super()._apply(fn, *args)
        self.codebook = codebook.to(self.codebook.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Refuse a stored codebook that is not finite and strictly increasing."""
        if (codebook := state_dict.get(prefix + "codebook")) is not None:
            _check_codebook(codebook)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_codebook(codebook: Tensor) -> None:
    if not torch.isfinite(codebook).all() or not (codebook.diff() > 0).all():
        raise UserError("Codebook values must be finite and strictly increasing.")


def _search(midpoints: Tensor, latents: Tensor) -> Tensor:
    """Count the midpoints [V - 1] below each value; a value on a midpoint stays with the lower level."""
    exact = latents.dtype if latents.dtype == torch.float64 else torch.float32
    midpoints, values = midpoints.to(exact), latents.to(exact).contiguous()
    cells = _make_cells(midpoints) if values.device.type == "cpu" and values.numel() >= SEARCH_BLOCK else None
    if cells is None:
        return torch.searchsorted(midpoints, values)
    tokens = torch.empty_like(values, dtype=torch.int64)
    for x, out in zip(values.view(-1).split(SEARCH_BLOCK), tokens.view(-1).split(SEARCH_BLOCK), strict=True):
        cell = cells.of(x)
        torch.add(cells.below.index_select(0, cell), x > cells.midpoint.index_select(0, cell), out=out)
    return tokens


@dataclass(frozen=True)
class _Cells:
    """Equal cells with at most one midpoint in each, so that one comparison finds a token.

    On a CPU this is several times faster than a binary search, which mispredicts its branches on random values. It is
    exact: the cell of a value never falls when the value rises, even with rounding, and the midpoints get their cells
    in the same way.
    """

    low: float
    scale: float  # cells per latent unit
    below: Tensor  # [cells] int64, number of midpoints in lower cells
    midpoint: Tensor  # [cells], the midpoint in the cell; infinite if it has none

    def of(self, x: Tensor) -> Tensor:
        """Return the cell of each value, int32."""
        last = len(self.below) - 1
        places = ((x.float() - self.low) * self.scale).nan_to_num_(last, last, 0).clamp_(0, last)
        return places.to(torch.int32)


def _make_cells(midpoints: Tensor) -> _Cells | None:
    """Return the cells of midpoints [V - 1] on the CPU; None if the midpoints are fewer than two or too uneven."""
    if len(midpoints) < 2:
        return None
    low, gap = midpoints[0].item(), midpoints.diff().min().item()
    num_cells = (midpoints[-1].item() - low) / gap * 1.01 + 3
    if not num_cells <= MAX_CELLS:
        return None
    cells = _Cells(low - gap, 1.01 / gap, torch.zeros(int(num_cells), dtype=torch.int64), torch.zeros(0))
    own = cells.of(midpoints)
    if not (own.diff() > 0).all():
        return None
    below = torch.searchsorted(own, torch.arange(int(num_cells), dtype=torch.int32))
    midpoint = midpoints.new_full((int(num_cells),), math.inf).index_copy(0, own.long(), midpoints)
    return _Cells(cells.low, cells.scale, below, midpoint)


def gaussian_quantizer(
    num_levels: int, *, value_range: float = GAUSSIAN_RANGE, num_sigmas: float = GAUSSIAN_SIGMAS
) -> ScalarQuantizer:
    """Return the paper's quantiser, whose levels are conditional means of equal-probability bins of N(0, 1).

    The outermost bins are cut at ±`num_sigmas`, and ±`num_sigmas` is mapped to ±`value_range`. In latent units the
    bins thus fit a standard deviation of `value_range / num_sigmas`, 5/3 by default.
    Source: equations 1-5; official models/tokenbridge.py, `_init_gaussian_quantization`.

    Args:
        num_levels: V, at least 2.
        value_range: latents beyond ± this value get the outermost levels.
        num_sigmas: standard deviations at which the Gaussian is cut.

    Raises:
        UserError: an argument is not positive, or the levels are so many that the codebook degenerates. With 3
            sigmas, float32 means leave their bins from 727 levels on, and from 741 on whole bins lie beyond the cut
            (the official code then puts a wrong value, 0, into its codebook).
    """
    return ScalarQuantizer(gaussian_codebook(num_levels, value_range=value_range, num_sigmas=num_sigmas))


def gaussian_codebook(num_levels: int, *, value_range: float, num_sigmas: float) -> Tensor:
    """Return the codebook [V] of `gaussian_quantizer`, float32, in latent units."""
    _check_levels(num_levels)
    _check_positive(value_range=value_range, num_sigmas=num_sigmas)
    edges = gaussian_bin_edges(num_levels, num_sigmas=num_sigmas)
    density = torch.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
    cumulative = 0.5 * (1 + torch.erf(edges / math.sqrt(2)))
    # E[x | a < x < b], equation 4. It is computed in float32 on purpose, as in models/tokenbridge.py, because the
    # published codebooks carry that rounding (about 1e-5 at 64 levels, more with more levels).
    means = -density.diff() / cumulative.diff()
    if not ((means > edges[:-1]) & (means < edges[1:])).all():
        raise UserError(
            f"{num_levels} levels are too many for ±{num_sigmas:g} sigmas: the outermost bins lie beyond the cut, or "
            "float32 cannot tell their means apart. Use fewer levels."
        )
    return (means + num_sigmas) / (2 * num_sigmas) * (2 * value_range) - value_range


def gaussian_bin_edges(num_levels: int, *, num_sigmas: float) -> Tensor:
    """Return the edges [V + 1] float32 of equal-probability bins of N(0, 1), cut at ±`num_sigmas` (equation 2)."""
    # Device and type are named, so that a model has its codebook even if it is built on the meta device
    # (weights.published.build_preset) or while another type is the default (from_pretrained with torch_dtype).
    probabilities = torch.linspace(0, 1, num_levels + 1, device="cpu", dtype=torch.float32)
    edges = torch.from_numpy(stats.norm.ppf(probabilities.numpy())).to(torch.float32)
    return edges.clamp(-num_sigmas, num_sigmas)


def uniform_quantizer(num_levels: int, *, value_range: float = GAUSSIAN_RANGE) -> ScalarQuantizer:
    """Return a quantiser whose levels are the midpoints of equal bins of [-`value_range`, `value_range`]."""
    _check_levels(num_levels)
    _check_positive(value_range=value_range)
    places = (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels
    return ScalarQuantizer((2 * places - 1) * value_range)


def lloyd_max_quantizer(latents: Tensor, num_levels: int, *, num_iterations: int = 500) -> ScalarQuantizer:
    """Return the quantiser of least squared error on calibration latents (Lloyd 1982, Max 1960).

    Lloyd's iteration alternates between cells of nearest values and cell means. It starts from quantiles and from
    Gaussian bins, and the best result is kept, which on the calibration data is never worse than `gaussian_quantizer`
    with its defaults. Because the data is sorted and summed once, an iteration costs only a search of the V midpoints.

    Args:
        latents: calibration latents of any shape.
        num_levels: V; the data must have at least as many distinct values.
        num_iterations: iterations at most; the search ends when no cell changes.

    Raises:
        UserError: the latents are not finite, or have fewer distinct values than levels.
    """
    _check_levels(num_levels)
    assert latents.is_floating_point(), f"latents must be floating point, not {latents.dtype}"
    if not torch.isfinite(latents).all():
        raise UserError("Calibration latents must be finite.")
    return ScalarQuantizer(_fit_lloyd_max(latents.flatten(), num_levels, num_iterations))


def _fit_lloyd_max(values: Tensor, num_levels: int, num_iterations: int) -> Tensor:
    """Run Lloyd's iteration from several starts and return the levels of least squared error."""
    values = values.to("cpu", torch.float64).sort().values
    distinct = values.unique_consecutive()
    if distinct.numel() < num_levels:
        raise UserError(f"{num_levels} levels need at least as many distinct calibration values.")
    # Lloyd's iteration finds the optimum near its start, and a level that starts without values never gets any. With
    # quantiles every level starts with values, whatever the distribution. Gaussian bins are near the optimum of most
    # latents, and a start from the paper's own codebook ensures that the result is never worse than it.
    places = (torch.arange(num_levels) + 0.5) * distinct.numel() / num_levels
    starts = [distinct[places.long()], *_gaussian_starts(values, num_levels)]
    fitted = [_iterate_lloyd(values, start, num_iterations) for start in starts]
    return min(fitted, key=lambda levels: _squared_error(values, levels))


def _iterate_lloyd(values: Tensor, levels: Tensor, num_iterations: int) -> Tensor:
    """Alternate nearest-level cells and cell means on sorted values, until no cell changes."""
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    previous = None
    for _ in range(num_iterations):
        ends = _cell_ends(values, levels)
        if previous is not None and torch.equal(ends, previous):
            break
        previous = ends
        counts = ends.diff()
        means = sums[ends].diff() / counts.clamp(min=1)
        levels = torch.where(counts > 0, means, levels)  # an empty cell keeps its value
    return levels


def _cell_ends(values: Tensor, levels: Tensor) -> Tensor:
    """Return where each level's cell begins and ends in the sorted values, [V + 1]."""
    inner = torch.searchsorted(values, (levels[:-1] + levels[1:]) / 2, right=True)
    return torch.cat([inner.new_zeros(1), inner, inner.new_tensor([values.numel()])])


def _squared_error(values: Tensor, levels: Tensor) -> float:
    return (values - levels.repeat_interleave(_cell_ends(values, levels).diff())).square().sum().item()


def _gaussian_starts(values: Tensor, num_levels: int) -> list[Tensor]:
    """Return the paper's codebook, plain and fitted to the data; an empty list if there are too many levels for it."""
    try:
        unit = gaussian_codebook(num_levels, value_range=GAUSSIAN_RANGE, num_sigmas=GAUSSIAN_SIGMAS).double()
    except UserError:
        return []
    return [unit, values.mean() + values.std() * unit]


def _check_levels(num_levels: int) -> None:
    if num_levels < 2:
        raise UserError(f"A quantiser needs at least 2 levels, not {num_levels}.")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} must be positive and finite, not {value}.")
