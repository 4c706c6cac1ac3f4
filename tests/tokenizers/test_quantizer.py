"""Quantiser: laws on random codebooks, numbers of the official code, known distortions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import load_golden
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenbridge.tokenizers.distortion import measure_distortion
from tokenbridge.tokenizers.quantizer import (
    GAUSSIAN_RANGE,
    GAUSSIAN_SIGMAS,
    SEARCH_BLOCK,
    ScalarQuantizer,
    _make_cells,
    gaussian_bin_edges,
    gaussian_codebook,
    gaussian_quantizer,
    lloyd_max_quantizer,
    uniform_quantizer,
)

# From 727 levels on the outermost bins are so thin that float32 puts their means outside (as officially).
MOST_LEVELS = 726

levels = st.integers(2, 300)
finite = st.floats(-1e4, 1e4, width=32)
latents_1d = st.lists(finite, min_size=1, max_size=50).map(torch.tensor)


@st.composite
def quantizers(draw: st.DrawFn) -> ScalarQuantizer:
    """Draw a Gaussian, a uniform or an arbitrary codebook."""
    kind = draw(st.sampled_from(["gaussian", "uniform", "any"]))
    if kind == "gaussian":
        return gaussian_quantizer(draw(levels), value_range=draw(st.floats(0.1, 100)))
    if kind == "uniform":
        return uniform_quantizer(draw(levels), value_range=draw(st.floats(0.1, 100)))
    # Steps of 2^-10 leave a float between neighbours, so that their midpoint is exact.
    steps = draw(st.lists(st.integers(-(10**6), 10**6), min_size=2, max_size=40, unique=True))
    return ScalarQuantizer(torch.tensor(sorted(steps)) / 1024)


def brute_force(codebook: Tensor, latents: Tensor) -> Tensor:
    """Return tokens as the official code does: the first smallest of all distances, in float64."""
    return (latents.double()[..., None] - codebook.double()).abs().argmin(-1)


def mse(quantizer: ScalarQuantizer, latents: Tensor) -> float:
    return float((quantizer(latents).double() - latents.double()).square().mean())


# Laws of encode and decode


@given(quantizers(), latents_1d)
def test_tokens_are_in_range(quantizer: ScalarQuantizer, x: Tensor) -> None:
    tokens = quantizer.encode(x)
    assert tokens.dtype == torch.int64
    assert tokens.shape == x.shape
    assert tokens.min() >= 0
    assert tokens.max() < quantizer.num_levels


@given(quantizers())
def test_encode_inverts_decode(quantizer: ScalarQuantizer) -> None:
    tokens = torch.arange(quantizer.num_levels)
    assert torch.equal(quantizer.encode(quantizer.decode(tokens)), tokens)


@given(quantizers(), latents_1d)
def test_quantising_twice_is_quantising_once(quantizer: ScalarQuantizer, x: Tensor) -> None:
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)


@given(quantizers(), latents_1d)
def test_quantising_is_monotone(quantizer: ScalarQuantizer, x: Tensor) -> None:
    assert (quantizer(x.sort().values).diff() >= 0).all()


@given(quantizers(), latents_1d)
def test_takes_the_nearest_value(quantizer: ScalarQuantizer, x: Tensor) -> None:
    codebook = quantizer.codebook.double()
    distance = (x.double() - codebook[quantizer.encode(x)]).abs()
    nearest = (x.double() - codebook[brute_force(codebook, x)]).abs()
    # A midpoint is rounded to float32 (2^-24 of its size), and both distances change by that much.
    rounding = codebook.abs().max() * 2**-23
    assert (distance - nearest <= rounding).all()


@given(quantizers(), st.integers(0, 10**6))
def test_agrees_with_brute_force_away_from_midpoints(quantizer: ScalarQuantizer, seed: int) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * 3
    away = ((x[:, None] - quantizer.midpoints).abs() > 1e-4).all(-1)
    assert torch.equal(quantizer.encode(x)[away], brute_force(quantizer.codebook, x)[away])


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=30, unique=True))
def test_ties_take_the_lower_token(values: list[int]) -> None:
    quantizer = ScalarQuantizer(torch.tensor(sorted(values), dtype=torch.float32))  # exact midpoints
    half_way = (quantizer.codebook[:-1] + quantizer.codebook[1:]) / 2
    assert quantizer.encode(half_way).tolist() == list(range(len(values) - 1))
    assert torch.equal(quantizer.encode(half_way), brute_force(quantizer.codebook, half_way))
    above = torch.nextafter(half_way, torch.tensor(math.inf))
    assert quantizer.encode(above).tolist() == list(range(1, len(values)))


@given(quantizers(), st.floats(0, 1), st.data())
def test_error_is_at_most_half_the_local_gap(quantizer: ScalarQuantizer, share: float, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, quantizer.num_levels - 2))
    low, high = quantizer.codebook[place : place + 2].double().tolist()
    x = torch.tensor([low + share * (high - low)], dtype=torch.float64)
    error = (quantizer(x).double() - x).abs().item()
    assert error <= (high - low) / 2 + max(abs(low), abs(high)) * 2**-23  # the midpoint is rounded to float32


@given(quantizers(), st.floats(0, 2.0**100, width=32))
def test_values_beyond_the_ends_take_the_end_tokens(quantizer: ScalarQuantizer, distance: float) -> None:
    low, high = quantizer.codebook[[0, -1]]
    assert quantizer.encode((low - distance)[None]).item() == 0
    assert quantizer.encode((high + distance)[None]).item() == quantizer.num_levels - 1


# Same result for every dtype, layout and device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tokens_do_not_depend_on_dtype(dtype: torch.dtype) -> None:
    quantizer = gaussian_quantizer(64)
    x = torch.linspace(-6, 6, 5001).to(torch.float16).to(torch.bfloat16)  # the fewest digits of all dtypes here
    assert torch.equal(x.to(dtype).double(), x.double())  # the same values
    assert torch.equal(quantizer.encode(x.to(dtype)), quantizer.encode(x.double()))


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return x [B, C, H, W] with the same values in other memory layouts."""
    padded = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 100.0)
    padded[..., ::2] = x
    return {
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": padded[..., ::2],
        "offset": torch.cat([x, x])[x.shape[0] :],
    }


def test_tokens_do_not_depend_on_layout() -> None:
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    quantizer = gaussian_quantizer(8)
    expected = quantizer.encode(x)
    for name, same in layouts(x).items():
        assert torch.equal(same, x), name
        assert torch.equal(quantizer.encode(same), expected), name
        assert torch.equal(quantizer(same), quantizer.decode(expected)), name
    expanded = x[:1].expand(2, -1, -1, -1)
    assert torch.equal(quantizer.encode(expanded), expected[:1].expand(2, -1, -1, -1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tokens_do_not_depend_on_device() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    quantizer = gaussian_quantizer(64)
    expected, values = quantizer.encode(x), quantizer(x)
    quantizer = quantizer.cuda()
    assert torch.equal(quantizer.encode(x.cuda()).cpu(), expected)
    assert torch.equal(quantizer(x.cuda()).cpu(), values)


class Largest(TorchDispatchMode):
    """Note the number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_no_tensor_has_an_axis_of_levels() -> None:
    quantizer = gaussian_quantizer(64)
    x = torch.randn(4, 16, 16, 16)
    with Largest() as largest:
        quantizer(x)
    assert largest.numel < x.numel() * 64 / 4
    assert largest.numel == x.numel()
    with Largest() as largest:  # mutation: the official distances have such an axis
        brute_force(quantizer.codebook, x)
    assert largest.numel >= x.numel() * 64 / 4


# The Gaussian codebook


@given(st.integers(2, MOST_LEVELS))
def test_gaussian_bins_are_equally_probable(num_levels: int) -> None:
    edges = gaussian_bin_edges(num_levels, num_sigmas=3.0).double().numpy()
    probabilities = stats.norm.cdf(edges[1:]) - stats.norm.cdf(edges[:-1])
    beyond = stats.norm.sf(3.0)  # what the cut takes from the outermost bins, and nothing from the others
    probabilities[0] += beyond
    probabilities[-1] += beyond
    # The quantiles' probabilities k/V and the edges are float32: 2^-24 each, twice per bin.
    assert abs(probabilities - 1 / num_levels).max() < 3e-7


@given(st.integers(2, MOST_LEVELS))
def test_conditional_means_are_inside_their_bins(num_levels: int) -> None:
    edges = gaussian_bin_edges(num_levels, num_sigmas=3.0)
    means = gaussian_codebook(num_levels, value_range=3.0, num_sigmas=3.0)
    assert ((means > edges[:-1]) & (means < edges[1:])).all()


@given(st.integers(2, 64))
def test_conditional_means_are_the_integral(num_levels: int) -> None:
    edges = gaussian_bin_edges(num_levels, num_sigmas=3.0).double()
    x = edges[:-1, None] + edges.diff()[:, None] * torch.linspace(0, 1, 2001, dtype=torch.float64)
    density = torch.exp(-0.5 * x**2)
    means = torch.trapezoid(x * density, x) / torch.trapezoid(density, x)
    ours = gaussian_codebook(num_levels, value_range=3.0, num_sigmas=3.0)
    # The float32 difference of two CDFs near 1 is off by 6e-8 of a probability of 1/64 or less: about 1e-5.
    torch.testing.assert_close(ours.double(), means, atol=2e-5, rtol=0)


@given(st.integers(2, 300))
def test_gaussian_codebook_is_symmetric(num_levels: int) -> None:
    codebook = gaussian_quantizer(num_levels).codebook
    torch.testing.assert_close(codebook, -codebook.flip(0), atol=2e-4, rtol=0)  # rounding as above, times 5/3


@pytest.mark.parametrize("num_levels", [8, 64])
def test_golden_quantizer(num_levels: int) -> None:
    golden = load_golden(f"quantizer-{num_levels}")
    config = golden.meta["config"]
    sigmas, value_range = config["std_range"], config["quant_max"]
    x, indices = golden.inputs["x"], golden.outputs["indices"]

    def allowed(quantizer: ScalarQuantizer) -> bool:
        """Tell whether tokens differ only within 1e-5 of a midpoint (the case's tolerance)."""
        close = (x[:, None] - quantizer.midpoints).abs().min(-1).values <= 1e-5
        return bool(((quantizer.encode(x) == indices) | close).all())

    quantizer = gaussian_quantizer(num_levels, value_range=value_range, num_sigmas=sigmas)
    assert allowed(quantizer)
    assert golden.close("dequantized", quantizer(x))
    assert golden.close("reconstruction_values", quantizer.codebook * sigmas / value_range)
    assert golden.close("boundaries", gaussian_bin_edges(num_levels, num_sigmas=sigmas))

    # Mutations: another cut, no stretching to the range, and bucketing by the bin edges must all fail.
    for mutant in (
        gaussian_quantizer(num_levels, num_sigmas=3.1),
        gaussian_quantizer(num_levels, value_range=3.0),
    ):
        assert not golden.close("reconstruction_values", mutant.codebook * sigmas / value_range)
        assert not golden.close("dequantized", mutant(x))
    assert not allowed(gaussian_quantizer(num_levels, num_sigmas=3.1))
    edges = golden.outputs["boundaries"][1:-1] * value_range / sigmas
    with mock.patch.object(ScalarQuantizer, "midpoints", edges):
        assert not allowed(gaussian_quantizer(num_levels))


# Distortion

ONE_MILLION = 1_000_000


@pytest.fixture(scope="module")
def normal_million() -> Tensor:
    return torch.randn(ONE_MILLION, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("num_levels", "expected"), [(8, 0.0403), (16, 0.01027), (32, 0.002599), (64, 0.000655)])
def test_known_error_on_normal_latents(normal_million: Tensor, num_levels: int, expected: float) -> None:
    quantizer = gaussian_quantizer(num_levels)
    squared = (quantizer(normal_million) - normal_million).double().square()
    # Four standard errors of a mean of a million, and half a unit of the last digit given.
    standard_error = (squared.std() / math.sqrt(ONE_MILLION)).item()
    last_digit = {8: 0.0001, 16: 0.00001, 32: 0.000001, 64: 0.000001}[num_levels]
    tolerance = 4 * standard_error + last_digit / 2
    assert abs(squared.mean().item() - expected) < tolerance
    assert abs(mse(uniform_quantizer(num_levels), normal_million) - expected) > tolerance  # mutation
    assert abs(mse(gaussian_quantizer(num_levels, value_range=4.0), normal_million) - expected) > tolerance


REAL_ERRORS = {8: 0.0420, 16: 0.01138, 32: 0.003136, 64: 0.000894}


@pytest.mark.parametrize("num_levels", list(REAL_ERRORS))
def test_known_error_on_real_latents(real_latents: Tensor, num_levels: int) -> None:
    # No sampling here; only the digits given limit the comparison (one unit of the last: 0.0008945 is at 64).
    tolerance = {8: 1e-4, 16: 1e-5, 32: 1e-6, 64: 1e-6}[num_levels]
    measured = measure_distortion(gaussian_quantizer(num_levels), real_latents)
    assert measured.relative_mse == pytest.approx(REAL_ERRORS[num_levels], abs=tolerance)
    mutant = measure_distortion(gaussian_quantizer(num_levels, value_range=4.9), real_latents)
    assert mutant.relative_mse != pytest.approx(REAL_ERRORS[num_levels], abs=tolerance)


def test_distortion_agrees_with_its_definitions(normal_million: Tensor) -> None:
    x = normal_million[:20_000] * 2 + 1
    quantizer = gaussian_quantizer(16, value_range=10.0)
    found = measure_distortion(quantizer, x)
    variance = x.double().var(correction=0).item()
    assert found.variance == pytest.approx(variance)
    assert found.mse == pytest.approx(mse(quantizer, x))
    assert found.relative_mse == pytest.approx(found.mse / variance)
    assert found.snr_db == pytest.approx(-10 * math.log10(found.relative_mse))
    assert found.bits_per_dimension == 4
    shares = quantizer.encode(x).bincount(minlength=16).double() / x.numel()
    assert found.entropy_bits == pytest.approx(-(shares * shares.log2()).sum().item())
    assert found.entropy_bits <= found.bits_per_dimension
    assert found.rate_distortion_relative_mse < found.lloyd_max_relative_mse < found.relative_mse
    with pytest.raises(ValueError, match="all equal"):
        measure_distortion(quantizer, torch.ones(10))


# Lloyd-Max


@given(st.integers(2, 24), st.integers(0, 10**6), st.sampled_from(["normal", "uniform", "heavy", "two lumps"]))
def test_lloyd_max_is_never_worse_than_gaussian_bins_fitted_to_the_data(v: int, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, generator=generator)
    if kind == "uniform":
        x = torch.rand(500, generator=generator)
    elif kind == "heavy":
        x = x**3
    elif kind == "two lumps":
        x = x + 10 * (torch.rand(500, generator=generator) < 0.5)
    start = x.mean() + x.std() * gaussian_codebook(v, value_range=GAUSSIAN_RANGE, num_sigmas=GAUSSIAN_SIGMAS)
    # The fit is in float64; rounding the codebook to float32 moves the error by about 1e-7 of itself.
    assert mse(lloyd_max_quantizer(x, v), x) <= mse(ScalarQuantizer(start), x) * (1 + 1e-6)


@pytest.mark.parametrize("num_levels", [8, 16, 32, 64])
def test_lloyd_max_on_real_latents(real_latents: Tensor, num_levels: int) -> None:
    whole = lloyd_max_quantizer(real_latents, num_levels, num_iterations=50)
    assert mse(whole, real_latents) < mse(gaussian_quantizer(num_levels), real_latents)


def test_lloyd_max_finds_the_known_optimum(normal_million: Tensor) -> None:
    x = normal_million[:200_000]
    quantizer = lloyd_max_quantizer(x, 8)
    squared = (quantizer(x) - x).double().square()
    tolerance = 4 * squared.std().item() / math.sqrt(x.numel())  # four standard errors, about 1 %
    assert squared.mean().item() == pytest.approx(0.03454, abs=tolerance)  # Max (1960), 8 levels
    assert mse(gaussian_quantizer(8), x) != pytest.approx(0.03454, abs=tolerance)  # mutation


def test_lloyd_max_levels_are_the_means_of_their_cells() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    quantizer = lloyd_max_quantizer(x, 8)
    tokens = quantizer.encode(x)
    means = torch.stack([x[tokens == t].double().mean() for t in range(8)])
    torch.testing.assert_close(quantizer.codebook.double(), means, atol=1e-6, rtol=1e-6)  # float32 codebook


def test_lloyd_max_keeps_more_levels_than_gaussian_bins_allow() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    assert lloyd_max_quantizer(x, 1024).num_levels == 1024


# Uniform bins


@given(levels, st.floats(0.1, 100))
def test_uniform_levels_are_the_middles_of_equal_bins(num_levels: int, value_range: float) -> None:
    quantizer = uniform_quantizer(num_levels, value_range=value_range)
    width = 2 * value_range / num_levels
    rounding = value_range * 2**-23  # float32 codebook
    torch.testing.assert_close(
        quantizer.codebook.diff(), torch.full((num_levels - 1,), width), atol=2 * rounding, rtol=1e-6
    )
    assert quantizer.codebook[0].item() == pytest.approx(-value_range + width / 2, abs=2 * rounding)
    x = torch.linspace(-value_range, value_range, 500)
    assert (quantizer(x) - x).abs().max() <= width / 2 + 4 * rounding


# Errors


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_encode_refuses_values_that_are_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match=r"1 of 3 latents are NaN or infinite"):
        gaussian_quantizer(8).encode(torch.tensor([0.0, bad, 1.0]))


def test_encode_refuses_integers() -> None:
    with pytest.raises(AssertionError, match=r"floating point, not torch\.int64"):
        gaussian_quantizer(8).encode(torch.tensor([1, 2]))


@pytest.mark.parametrize(("token", "span"), [(-1, r"\[-1, 0\]"), (8, r"\[0, 8\]")])
def test_decode_refuses_tokens_out_of_range(token: int, span: str) -> None:
    with pytest.raises(ValueError, match=rf"span {span}, but there are 8 levels"):
        gaussian_quantizer(8).decode(torch.tensor([0, token]))


@pytest.mark.parametrize("tokens", [torch.tensor([0.0]), torch.tensor([True])])
def test_decode_refuses_what_is_no_integer(tokens: Tensor) -> None:
    with pytest.raises(AssertionError, match="must be integers"):
        gaussian_quantizer(8).decode(tokens)


def test_empty_tensors_pass() -> None:
    quantizer = gaussian_quantizer(8)
    assert quantizer.encode(torch.empty(0, 3)).shape == (0, 3)
    assert quantizer.decode(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3)


def test_degenerate_levels_are_refused() -> None:
    assert gaussian_quantizer(MOST_LEVELS).num_levels == MOST_LEVELS
    for too_many in (727, 740, 741, 1024):  # float32 means leave their bins; from 741 on, bins fall together
        with pytest.raises(ValueError, match=f"{too_many} levels are too many"):
            gaussian_quantizer(too_many)


@pytest.mark.parametrize("num_levels", [1, 0, -3])
def test_too_few_levels_are_refused(num_levels: int) -> None:
    for make in (gaussian_quantizer, uniform_quantizer, lambda v: lloyd_max_quantizer(torch.randn(9), v)):
        with pytest.raises(ValueError, match=f"at least 2 levels, not {num_levels}"):
            make(num_levels)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_ranges_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="value_range must be positive"):
        gaussian_quantizer(8, value_range=bad)
    with pytest.raises(ValueError, match="num_sigmas must be positive"):
        gaussian_quantizer(8, num_sigmas=bad)
    with pytest.raises(ValueError, match="value_range must be positive"):
        uniform_quantizer(8, value_range=bad)


@pytest.mark.parametrize(
    "codebook",
    [[0.0, 0.0], [1.0, 0.0], [0.0, math.nan], [0.0, math.inf]],
)
def test_broken_codebooks_are_refused(codebook: Any) -> None:
    with pytest.raises(ValueError, match="finite and strictly increasing"):
        ScalarQuantizer(torch.tensor(codebook))


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2, 3, 4)])
def test_codebooks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match=r"a codebook (is|has)"):
        ScalarQuantizer(torch.zeros(shape))


def test_lloyd_max_refuses_bad_calibration_data() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        lloyd_max_quantizer(torch.tensor([0.0, math.nan, 1.0]), 2)
    with pytest.raises(AssertionError, match="floating point"):
        lloyd_max_quantizer(torch.arange(10), 2)
    with pytest.raises(ValueError, match="3 levels need at least as many distinct"):
        lloyd_max_quantizer(torch.tensor([0.0, 1.0, 1.0, 0.0]), 3)


# state_dict


def test_state_dict_round_trip() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    saved = lloyd_max_quantizer(x**3, 8)
    assert list(saved.state_dict()) == ["codebook"]
    loaded = gaussian_quantizer(8)
    assert not torch.equal(loaded.encode(x), saved.encode(x))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded.midpoints, saved.midpoints)
    assert torch.equal(loaded.encode(x), saved.encode(x))


def test_loading_a_broken_codebook_is_refused() -> None:
    quantizer = gaussian_quantizer(8)
    before = quantizer.codebook.clone()
    with pytest.raises(ValueError, match="finite and strictly increasing"):
        quantizer.load_state_dict({"codebook": torch.zeros(8)})
    assert torch.equal(quantizer.codebook, before)


def test_loading_another_number_of_levels_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        gaussian_quantizer(8).load_state_dict(gaussian_quantizer(16).state_dict())


@given(st.integers(2, 64), st.integers(2, 4), st.integers(0, 10_000))
def test_lloyd_max_is_never_worse_than_the_papers_codebook(num_levels: int, num_lumps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lumps = [torch.randn(300, generator=generator) * scale for scale in (0.05, 1.0, 3.0, 10.0)[:num_lumps]]
    x = torch.cat([lump + 4 * torch.randn(1, generator=generator) for lump in lumps])
    errors = [
        (quantizer(x) - x).double().square().mean().item()
        for quantizer in (lloyd_max_quantizer(x, num_levels), gaussian_quantizer(num_levels))
    ]
    assert errors[0] <= errors[1] * (1 + 1e-5)  # codebooks are float32


def test_lloyd_max_uses_every_level() -> None:
    """An outlier must not leave levels without values."""
    x = torch.cat([torch.randn(10_000, generator=torch.Generator().manual_seed(0)), torch.tensor([1e4])])
    assert lloyd_max_quantizer(x, 64).encode(x).unique().numel() == 64


# The CPU's table look-up against the binary search


@pytest.mark.parametrize("num_levels", [2, 3, 16, 64, 100, 726])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_look_up_equals_binary_search(num_levels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_levels)
    quantizer = gaussian_quantizer(num_levels)
    midpoints = quantizer.midpoints.to(dtype)
    beside = [midpoints.nextafter(midpoints.new_tensor(end)) for end in (-math.inf, math.inf)]
    sharp = torch.cat([midpoints, *beside, midpoints.new_tensor([-1e30, 1e30, 0.0])])
    x = torch.cat([sharp, 2 * torch.randn(SEARCH_BLOCK, generator=generator, dtype=dtype)])
    with mock.patch("tokenbridge.tokenizers.quantizer._make_cells", return_value=None):
        searched = quantizer.encode(x)
    assert torch.equal(quantizer.encode(x), searched)
    assert torch.equal(searched, torch.searchsorted(midpoints, x))  # the mock had an effect, or both are right
    if num_levels > 2:  # mutation: cells that ignore their midpoint must be told apart
        cells = _make_cells(midpoints)
        assert cells is not None
        blunt = replace(cells, midpoint=torch.full_like(cells.midpoint, math.inf))
        with mock.patch("tokenbridge.tokenizers.quantizer._make_cells", return_value=blunt):
            assert not torch.equal(quantizer.encode(x), searched)


def test_uneven_codebooks_fall_back_to_the_search() -> None:
    uneven = ScalarQuantizer(torch.tensor([0.0, 1e-6, 2e-6, 1.0, 2.0]))
    assert _make_cells(uneven.midpoints) is None
    x = torch.rand(SEARCH_BLOCK, generator=torch.Generator().manual_seed(0)) * 3 - 0.5
    assert torch.equal(uneven.encode(x), torch.searchsorted(uneven.midpoints, x))
