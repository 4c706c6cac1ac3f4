"""Orders of channels and positions, the mask and guidance schedules."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenbridge.models.masked_sampling import guidance_at, masked_counts, random_orders, training_mask_count
from tokenbridge.models.tokenbridge.orders import (
    OFFICIAL_CHANNEL_ORDER,
    channel_order,
    frequency_order,
    inverse,
    natural_order,
)

permutations = st.integers(1, 40).flatmap(lambda n: st.permutations(range(n))).map(tuple)


def noise(num_channels: int, size: int, seed: int) -> Tensor:
    return torch.randn(6, num_channels, size, size, generator=torch.Generator().manual_seed(seed))


# Channel orders


@given(permutations)
def test_inverse_undoes_a_permutation(order: tuple[int, ...]) -> None:
    back = inverse(order)
    assert [back[order[i]] for i in range(len(order))] == list(range(len(order)))
    assert inverse(back) == order
    values = torch.arange(len(order)) * 10
    assert torch.equal(values[list(order)][list(back)], values)


@pytest.mark.parametrize("order", [(0, 0), (1, 2), (0, 2), (-1, 0)])
def test_inverse_refuses_what_is_no_permutation(order: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not a permutation"):
        inverse(order)


def test_named_orders() -> None:
    assert channel_order("natural", 5) == natural_order(5) == (0, 1, 2, 3, 4)
    assert channel_order("official", 16) == OFFICIAL_CHANNEL_ORDER
    assert sorted(OFFICIAL_CHANNEL_ORDER) == list(range(16))
    latents = noise(3, 8, 0)
    assert channel_order("frequency", 3, latents) == frequency_order(latents)


def test_named_orders_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="for 16 channels, not 4"):
        channel_order("official", 4)
    with pytest.raises(ValueError, match="none were given"):
        channel_order("frequency", 4)
    with pytest.raises(ValueError, match="Unknown channel order 'magic'"):
        channel_order("magic", 4)


@given(st.integers(1, 12), st.sampled_from([4, 8, 16]), st.integers(0, 10**6), st.data())
def test_frequency_order_puts_the_low_channel_first(c: int, size: int, seed: int, data: st.DataObject) -> None:
    low = data.draw(st.integers(0, c - 1))
    latents = noise(c, size, seed)
    latents[:, low] += 20  # a constant is the lowest frequency
    order = frequency_order(latents)
    assert order[0] == low
    assert sorted(order) == list(range(c))


def test_frequency_order_sorts_waves_by_their_frequency() -> None:
    places = torch.arange(16) / 16
    waves = torch.stack([torch.cos(2 * math.pi * cycles * places) for cycles in (7, 1, 4, 2)])
    latents = waves[None, :, None, :].expand(2, -1, 16, -1) + 0.01 * noise(4, 16, 0)[:2]
    # The half sampling rate is 8 cycles in 16 places.
    assert set(frequency_order(latents, cutoff=2 / 8)[:2]) == {1, 3}
    assert frequency_order(latents, cutoff=1 / 8)[0] == 1
    assert set(frequency_order(latents, cutoff=4 / 8)[:3]) == {1, 2, 3}


@given(st.integers(0, 10**6), st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5))
def test_frequency_order_does_not_depend_on_scale(seed: int, scales: list[float]) -> None:
    latents = noise(5, 8, seed)
    latents[:, :, :4] += torch.arange(5)[:, None, None]  # shares far enough apart for rounding not to matter
    assert frequency_order(latents * torch.tensor(scales)[:, None, None]) == frequency_order(latents)


def test_frequency_order_accepts_an_empty_channel() -> None:
    latents = noise(3, 8, 0)
    latents[:, 1] = 0
    assert frequency_order(latents)[-1] == 1


@pytest.mark.parametrize("cutoff", [0.0, -0.1, 1.1, math.nan])
def test_frequency_order_refuses_bad_cutoffs(cutoff: float) -> None:
    with pytest.raises(ValueError, match="share of the Nyquist frequency"):
        frequency_order(noise(2, 4, 0), cutoff=cutoff)


def test_frequency_order_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"must be \[B, C, H, W\], not \[2, 16, 4\]"):
        frequency_order(torch.zeros(2, 16, 4))


# Orders of positions


def test_random_orders_are_permutations_and_differ() -> None:
    torch.manual_seed(0)
    orders = random_orders(20, 16)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(16).expand(20, -1))
    assert len({tuple(order.tolist()) for order in orders}) == 20
    torch.manual_seed(0)
    assert torch.equal(random_orders(20, 16), orders)


# Schedules

lengths_and_iterations = st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(lengths_and_iterations)
def test_masked_counts_fall_to_zero(sizes: tuple[int, int]) -> None:
    length, iterations = sizes
    counts = masked_counts(length, iterations)
    assert len(counts) == iterations
    assert counts[-1] == 0
    falling = [length, *counts]
    assert all(after < before for before, after in pairwise(falling))


@given(lengths_and_iterations)
def test_every_position_is_predicted_once(sizes: tuple[int, int]) -> None:
    length, iterations = sizes
    before, predicted = length, []
    for after in masked_counts(length, iterations):
        predicted += list(range(length))[after:before]
        before = after
    assert sorted(predicted) == list(range(length))


@given(st.integers(1, 400))
def test_as_many_iterations_as_positions_take_one_at_a_time(length: int) -> None:
    assert masked_counts(length, length) == list(range(length - 1, -1, -1))


def test_masked_counts_follow_the_cosine() -> None:
    # floor(256 cos(pi/2 i/8)) by hand; a mutation, the linear schedule, would give 224 first
    assert masked_counts(256, 8) == [251, 236, 212, 181, 142, 97, 49, 0]


@pytest.mark.parametrize("iterations", [0, -1, 17])
def test_masked_counts_refuse_bad_iterations(iterations: int) -> None:
    with pytest.raises(ValueError, match=rf"in \[1, 16\], not {iterations}"):
        masked_counts(16, iterations)


@given(st.floats(0, 10), st.integers(1, 400))
def test_linear_guidance_ends(scale: float, length: int) -> None:
    assert guidance_at(scale, "linear", length, length) == 1  # all masked: nothing to guide by yet
    last = guidance_at(scale, "linear", length, 0)
    assert last == guidance_at(scale, "linear", length, 1)  # the official mask length is at least 1
    assert last == pytest.approx(1 + (scale - 1) * (length - 1) / length)


@given(st.floats(1, 10), lengths_and_iterations)
def test_linear_guidance_rises_between_one_and_the_scale(scale: float, sizes: tuple[int, int]) -> None:
    length, iterations = sizes
    values = [guidance_at(scale, "linear", length, n) for n in masked_counts(length, iterations)]
    assert values == sorted(values)
    assert all(1 <= value <= scale + 1e-12 for value in values)


@given(st.floats(0, 10), st.integers(0, 16))
def test_constant_guidance(scale: float, masked: int) -> None:
    assert guidance_at(scale, "constant", 16, masked) == scale


def test_guidance_refuses_unknown_schedules() -> None:
    with pytest.raises(ValueError, match="Unknown guidance schedule 'cosine'"):
        guidance_at(2.0, "cosine", 16, 3)


@given(st.integers(1, 1000), st.integers(0, 10**6))
def test_training_mask_count_is_in_range(length: int, seed: int) -> None:
    torch.manual_seed(seed)
    assert math.ceil(0.7 * length) <= training_mask_count(length) <= length


def test_training_mask_count_has_the_right_mean() -> None:
    torch.manual_seed(0)
    counts = torch.tensor([training_mask_count(10_000) for _ in range(2000)]).double() / 10_000
    # Mean of N(1, 0.25) cut to [0.7, 1]: 1 - 0.25 (phi(0) - phi(1.2)) / (Phi(1.2) - Phi(0)). The deviation is
    # about 0.08, so four standard errors of 2000 draws are 0.008; a uniform rate (mean 0.85) must fail.
    assert counts.mean().item() == pytest.approx(0.86703, abs=0.008)
    assert abs(0.85 - 0.86703) > 0.008
    torch.manual_seed(0)
    assert training_mask_count(100, ratio_min=0.999) == 100
