"""Dimension-wise post-training quantisation of continuous latents (paper section 3.1, equations 1-5).

Every latent value is replaced, on its own, by the nearest of `num_levels` codebook values; its token is the index
of that value. Nothing is trained. Three ways to make the codebook:

- `gaussian_quantizer`: equal-probability bins of a Gaussian, each replaced by its conditional mean (the paper);
- `uniform_quantizer`: the middles of bins of equal width (the paper's robustness remark);
- `lloyd_max_quantizer`: the codebook of least squared error on calibration latents.

All three are a `ScalarQuantizer`, which encodes by searching the midpoints between sorted codebook values: the
official code (models/tokenbridge.py, `quantize`) forms all distances and takes the smallest, which gives the same
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

SEARCH_BLOCK = 1 << 14  # values looked up at a time on the CPU, so that what a block needs stays in its cache
MAX_CELLS = 1 << 16  # of the table for the look-up; 64 Gaussian levels need about 130


class ScalarQuantizer(nn.Module):
    """Map latents to tokens and back by the nearest value of a sorted codebook.

    Buffers (saved with `state_dict`): `codebook`, float32 [V].

    Args:
        codebook: strictly increasing values [V >= 2] in latent units.

    Raises:
        UserError: values that are not finite or do not strictly increase.
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
        """Number of codebook values V."""
        return len(self.codebook)

    @property
    def midpoints(self) -> Tensor:
        """Where one level ends and the next begins, [V - 1]."""
        return (self.codebook[:-1] + self.codebook[1:]) / 2

    def encode(self, latents: Tensor) -> Tensor:
        """Return the tokens of latents: same shape, int64, in [0, V).

        Values outside the codebook's span get its first or last token; a value half-way between two codebook
        values gets the lower token (as the official argmin over distances does).

        Args:
            latents: float tensor of any layout, in latent units; compared in float32 (or float64 if it is).

        Raises:
            UserError: NaN or infinite latents.
        """
        assert latents.is_floating_point(), f"latents must be floating point, not {latents.dtype}"
        if latents.numel() and not all(torch.isfinite(end) for end in latents.aminmax()):
            bad = int((~torch.isfinite(latents)).sum())
            raise UserError(f"{bad} of {latents.numel()} latents are NaN or infinite.")
        return self.nearest(latents)

    def nearest(self, latents: Tensor) -> Tensor:
        """`encode` without its checks, for loops that must not wait for the device."""
        return _search(self.midpoints, latents)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the codebook values of tokens: same shape, the codebook's dtype, in latent units.

        Raises:
            UserError: tokens outside [0, V).
        """
        is_integer = not (tokens.is_floating_point() or tokens.dtype == torch.bool)
        assert is_integer, f"tokens must be integers, not {tokens.dtype}"
        if tokens.numel() and not ((tokens >= 0) & (tokens < self.num_levels)).all():
            low, high = int(tokens.min()), int(tokens.max())
            raise UserError(f"Tokens span [{low}, {high}], but there are {self.num_levels} levels.")
        return self.lookup(tokens)

    def lookup(self, tokens: Tensor) -> Tensor:
        """`decode` without its checks, for loops that must not wait for the device."""
        return self.codebook[tokens]

    def forward(self, latents: Tensor) -> Tensor:
        """Return the de-quantised latents: `decode(encode(latents))`."""
        return self.lookup(self.encode(latents))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> ScalarQuantizer:
        """Move with the model, but stay in float32: a codebook in half precision gives other tokens."""
        codebook = self.codebook
        super()._apply(fn, *args)
        self.codebook = codebook.to(self.codebook.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Refuse a codebook that is not one."""
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
    """Equal cells over the midpoints, at most one midpoint in each, so that one comparison finds a token.

    On a CPU several times faster than a binary search, which mispredicts its branches on random values. Exact: the
    cell of a value never falls when the value rises, rounding included, and midpoints get theirs the same way.
    """

    low: float
    scale: float  # cells per latent unit
    below: Tensor  # [cells] int64, number of midpoints in lower cells
    midpoint: Tensor  # [cells], the cell's own; infinite if it has none

    def of(self, x: Tensor) -> Tensor:
        """Return the cell of each value, int32."""
        last = len(self.below) - 1
        places = ((x.float() - self.low) * self.scale).nan_to_num_(last, last, 0).clamp_(0, last)
        return places.to(torch.int32)


def _make_cells(midpoints: Tensor) -> _Cells | None:
    """Return the cells of midpoints [V - 1] on the CPU; None if there are fewer than two or they are too uneven."""
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
    """Return the paper's quantiser: conditional means of equal-probability bins of N(0, 1).

    The outermost bins are cut at ±`num_sigmas`, and ±`num_sigmas` is mapped to ±`value_range`: in latent units
    the bins are fitted to a standard deviation of `value_range / num_sigmas`, 5/3 by default.
    Source: equations 1-5; official models/tokenbridge.py, `_init_gaussian_quantization`.

    Args:
        num_levels: V, at least 2.
        value_range: latents beyond ± this are clamped to the outermost levels.
        num_sigmas: where the Gaussian is cut.

    Raises:
        UserError: arguments that are not positive, or so many levels that the codebook degenerates: with 3
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
    # E[x | a < x < b], equation 4. Deliberately in float32, as models/tokenbridge.py computes it: the published
    # codebooks carry its rounding (about 1e-5 at 64 levels, growing with the number of levels).
    means = -density.diff() / cumulative.diff()
    if not ((means > edges[:-1]) & (means < edges[1:])).all():
        raise UserError(
            f"{num_levels} levels are too many for ±{num_sigmas:g} sigmas: the outermost bins lie beyond the cut, or "
            "float32 cannot tell their means apart. Use fewer levels."
        )
    return (means + num_sigmas) / (2 * num_sigmas) * (2 * value_range) - value_range


def gaussian_bin_edges(num_levels: int, *, num_sigmas: float) -> Tensor:
    """Return the edges [V + 1] float32 of equal-probability bins of N(0, 1), cut at ±`num_sigmas` (equation 2)."""
    # Device and type are named, so that a model built on the meta device (presets.create_model) or while another
    # type is the default (from_pretrained with torch_dtype) has its codebook all the same.
    probabilities = torch.linspace(0, 1, num_levels + 1, device="cpu", dtype=torch.float32)
    edges = torch.from_numpy(stats.norm.ppf(probabilities.numpy())).to(torch.float32)
    return edges.clamp(-num_sigmas, num_sigmas)


def uniform_quantizer(num_levels: int, *, value_range: float = GAUSSIAN_RANGE) -> ScalarQuantizer:
    """Return a quantiser with the middles of `num_levels` equal bins of [-`value_range`, `value_range`]."""
    _check_levels(num_levels)
    _check_positive(value_range=value_range)
    places = (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels
    return ScalarQuantizer((2 * places - 1) * value_range)


def lloyd_max_quantizer(latents: Tensor, num_levels: int, *, num_iterations: int = 500) -> ScalarQuantizer:
    """Return the quantiser of least squared error on calibration latents (Lloyd 1982, Max 1960).

    Alternates nearest-value assignment and cell means, from quantiles and from Gaussian bins, and keeps the best: on
    the calibration data it is never worse than `gaussian_quantizer` with its defaults. Sorted data and running sums
    make one iteration cost a search of the V midpoints.

    Args:
        latents: calibration latents, any shape.
        num_levels: V; the data must have at least as many distinct values.
        num_iterations: upper limit; stops when no cell changes.

    Raises:
        UserError: latents that are not finite, or have fewer distinct values than levels.
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
    # Lloyd's iteration finds the optimum near its start, and a level that starts without values keeps none. Quantiles
    # start every level with values, whatever the distribution; Gaussian bins are near the optimum of most latents,
    # and starting from the paper's own codebook makes sure never to be worse than it.
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
    """Return the paper's codebook as it is and fitted to the data; nothing where there are too many levels."""
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
