"""The diffusion process: schedule, respacing, reverse distribution, loss; laws, and diffusers' scheduler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenbridge.models.mar.diffusion import NUM_TIMESTEPS, Diffusion, cosine_betas, diffusion_process, spaced_timesteps

FULL = Diffusion()
SHORT = Diffusion(100)
C = 4
steps = st.integers(0, SHORT.num_steps - 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Respacing


@given(st.integers(2, NUM_TIMESTEPS))
def test_spaced_timesteps_rise_evenly_from_the_first_to_the_last(count: int) -> None:
    timesteps = spaced_timesteps(count)
    assert (timesteps[0], timesteps[-1], len(timesteps)) == (0, NUM_TIMESTEPS - 1, count)
    gaps = np.diff(timesteps)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    assert spaced_timesteps(str(count)) == timesteps


@given(st.lists(st.integers(1, 100), min_size=1, max_size=7))
def test_sections_hold_as_many_as_asked_for(counts: list[int]) -> None:
    timesteps = np.array(spaced_timesteps(",".join(map(str, counts))))
    sections = np.array_split(np.arange(NUM_TIMESTEPS), len(counts))  # the first ones are longer there too
    assert [int(np.isin(timesteps, section).sum()) for section in sections] == counts
    assert len(timesteps) == len(np.unique(timesteps))


def test_other_spacings() -> None:
    assert spaced_timesteps("") == spaced_timesteps(1000) == list(range(1000))
    assert spaced_timesteps("ddim25") == list(range(0, 1000, 40))
    assert spaced_timesteps("10,15,20", 300)[:11] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99, 100]
    assert spaced_timesteps(4, 8) == [0, 2, 5, 7]  # 2.33 and 4.67
    assert spaced_timesteps(3, 6) == [0, 2, 5]  # 2.5: halves go to the even number


@pytest.mark.parametrize("spacing", [0, -3, 1001, "500,501", "ddim3333", "ddim999"])
def test_spacings_that_do_not_exist(spacing: int | str) -> None:
    with pytest.raises(ValueError, match=r"must be in|No integer stride"):
        spaced_timesteps(spacing)


def test_a_single_step_has_no_variance() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Diffusion(1)


@given(st.integers(2, NUM_TIMESTEPS))
def test_a_shorter_process_has_the_noise_levels_of_the_full_one(count: int) -> None:
    short = Diffusion(count)
    assert torch.equal(short.timesteps, torch.tensor(spaced_timesteps(count)))
    torch.testing.assert_close(short.signal, FULL.signal[short.timesteps], rtol=1e-5, atol=0)
    torch.testing.assert_close(short.noise, FULL.noise[short.timesteps], rtol=1e-5, atol=0)


# Schedule


def test_cosine_schedule() -> None:
    betas = cosine_betas()
    assert betas.dtype == np.float64
    assert (betas > 0).all()
    assert betas.max() == betas[-1] == 0.999  # cut; without it the last would be 1
    assert (np.diff(betas) >= 0).all()
    time = (np.arange(1, 1001) / 1000 + 0.008) / 1.008 * math.pi / 2
    whole = np.cos(time[:-1]) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], whole, rtol=1e-9)


@given(st.integers(2, NUM_TIMESTEPS))
def test_signal_falls_noise_rises_and_variance_is_kept(count: int) -> None:
    process = Diffusion(count)
    assert (process.signal.diff() < 0).all()
    assert (process.noise.diff() >= 0).all()
    torch.testing.assert_close(process.signal**2 + process.noise**2, torch.ones(count))
    assert process.signal[0] > 0.99
    assert process.signal[-1] < 1e-4


@given(steps, st.integers(0, 10))
def test_x_0_and_the_noise_give_x_t_and_back(t: int, seed: int) -> None:
    start, noise = normal(3, C, seed=seed), normal(3, C, seed=seed + 1)
    x = SHORT.add_noise(start, noise, t)
    reverse = SHORT.reverse(x, t, torch.cat([noise, torch.zeros(3, C)], dim=-1))
    # x_0 is a difference of two numbers of about 1 / signal.
    error = 1e-6 / float(SHORT.signal[t])
    torch.testing.assert_close(reverse.start, start, rtol=0, atol=5 * error)
    torch.testing.assert_close(reverse.mean, SHORT.posterior_mean(reverse.start, x, t))


@given(steps, st.floats(-1, 1))
def test_the_variance_lies_between_posterior_and_beta(t: int, place: float) -> None:
    output = torch.cat([torch.zeros(1, C), torch.full((1, C), place)], dim=-1)
    variance = SHORT.reverse(torch.zeros(1, C), t, output).log_variance
    low, high = SHORT.min_log_variance[t], SHORT.max_log_variance[t]
    assert (low - 1e-5 <= variance).all()
    assert (variance <= high + 1e-5).all()
    ends = [
        SHORT.reverse(torch.zeros(1, C), t, torch.cat([torch.zeros(1, C), torch.full((1, C), e)], -1))
        for e in (-1.0, 1.0)
    ]
    torch.testing.assert_close(ends[0].log_variance, low.expand(1, C))
    torch.testing.assert_close(ends[1].log_variance, high.expand(1, C))
    # Equal at t = 1 for the posterior that stands in at t = 0; elsewhere beta is the larger.
    assert low < high if t else torch.isfinite(low)


@given(st.integers(1, SHORT.num_steps - 1))
def test_posterior_steps_keep_the_marginal(t: int) -> None:
    """If x_t has its marginal given x_0, a step by the true posterior has that of t - 1: q is consistent."""
    mean = SHORT.mean_of_start[t] + SHORT.mean_of_x[t] * SHORT.signal[t]
    assert mean.item() == pytest.approx(SHORT.signal[t - 1].item(), rel=1e-4)
    posterior = SHORT.min_log_variance[t].exp()
    variance = posterior + (SHORT.mean_of_x[t] * SHORT.noise[t]) ** 2
    assert variance.item() == pytest.approx(SHORT.noise[t - 1].item() ** 2, rel=1e-4)


# Sampling


def test_the_temperature_multiplies_the_noise_alone() -> None:
    x, output, noise = normal(5, C), normal(5, 2 * C, seed=1), normal(5, C, seed=2)
    mean = SHORT.reverse(x, 50, output).mean
    assert torch.equal(SHORT.step(x, 50, output, noise, 0.0), mean)
    full, half = (SHORT.step(x, 50, output, noise, temperature) - mean for temperature in (1.0, 0.5))
    torch.testing.assert_close(half, full / 2)
    assert full.abs().min() > 0
    assert torch.equal(SHORT.step(x, 0, output, noise), SHORT.reverse(x, 0, output).mean)  # no noise at the end


def test_a_perfect_predictor_samples_the_distribution() -> None:
    """x_0 ~ N(2, 0.5^2): the noise's expectation is known, and so is where samples must land."""
    location, scale, num = 2.0, 0.5, 20_000
    process = SHORT
    x = normal(num, 1)
    for t in reversed(range(process.num_steps)):
        signal, noise = process.signal[t], process.noise[t]
        expected = noise * (x - signal * location) / (signal**2 * scale**2 + noise**2)
        output = torch.cat([expected, torch.full_like(x, -1.0)], dim=-1)
        x = process.step(x, t, output, normal(num, 1, seed=t + 1))
    # Standard errors are 0.0035 and 0.0025; a hundred steps with the lower variance end up 2 % too narrow.
    assert x.mean().item() == pytest.approx(location, abs=0.02)
    assert x.std().item() == pytest.approx(scale, abs=0.03)


# Loss


def test_the_bound_of_the_true_posterior_is_zero() -> None:
    """Predicting the very noise with the posterior's variance leaves no divergence; any other variance does."""
    t = torch.tensor([1, 40, 100, 300])  # later, posterior and beta are the same to float32
    start, noise = normal(4, C), normal(4, C, seed=1)
    x = FULL.add_noise(start, noise, t)

    def losses(place: float, error: float) -> tuple[Tensor, Tensor]:
        return FULL.losses(start, x, noise, t, torch.cat([noise + error, torch.full((4, C), place)], dim=-1))

    squared, bound = losses(-1.0, 0.0)
    assert torch.equal(squared, torch.zeros(4))
    torch.testing.assert_close(bound, torch.zeros(4), rtol=0, atol=1e-6)
    assert (losses(0.0, 0.0)[1] > bound).all()
    squared, worse = losses(-1.0, 0.3)
    torch.testing.assert_close(squared, torch.full((4,), 0.09))
    assert (worse > bound + 1e-4).all()


def test_the_variance_learns_from_the_bound_alone_and_the_noise_from_the_error_alone() -> None:
    t = torch.tensor([0, 3, 700])
    start, noise, output = normal(3, C), normal(3, C, seed=1), normal(3, 2 * C, seed=2).requires_grad_()
    squared, bound = FULL.losses(start, FULL.add_noise(start, noise, t), noise, t, output)
    (of_error,) = torch.autograd.grad(squared.sum(), output, retain_graph=True)
    (of_bound,) = torch.autograd.grad(bound.sum(), output)
    assert (of_error[:, C:] == 0).all()
    assert (of_error[:, :C] != 0).all()
    assert (of_bound[:, :C] == 0).all()
    assert (of_bound[:, C:] != 0).any(dim=1).all()


def test_the_likelihood_at_the_end_is_a_distribution_over_levels() -> None:
    """At t = 0 the bound is -log2 of a level's probability: over all 256 levels these add up to 1."""
    levels = torch.linspace(-1, 1, 256)
    x = torch.full((256, 1), 0.3)  # so that every row has the same mean and variance
    output = torch.tensor([[0.5, 1.0]]).expand(256, 2)
    t = torch.zeros(256, dtype=torch.int64)
    _, bits = FULL.losses(levels[:, None], x, x, t, output)
    assert (2.0 ** -bits.double()).sum().item() == pytest.approx(1, abs=1e-3)  # what is clamped: 1e-12 a level


def test_the_bound_of_gaussian_data_is_their_entropy() -> None:
    """For x_0 ~ N(0, s^2), mean and variance of every step are known, and with them the bound is tight.

    It is then what a level 2/255 wide costs under the data's own density, in bits: no predictor does better.
    """
    scale, num = 0.3, 1000
    start = (scale * normal(num, 1)).clamp(-0.99, 0.99)  # inside the open ends, which 0.1 % would reach
    density = (start / scale).square() / 2 * math.log2(math.e) + math.log2(scale * math.sqrt(2 * math.pi))
    entropy = density.mean().item() - math.log2(2 / 255)
    best = wrong = 0.0
    for t in range(NUM_TIMESTEPS):
        signal, deviation = FULL.signal[t], FULL.noise[t]
        steps = torch.full((num,), t)
        noise = normal(num, 1, seed=t + 1)
        x = FULL.add_noise(start, noise, steps)
        variance = signal**2 * scale**2 + deviation**2  # of x_t
        expected = deviation * x / variance
        spread = (scale * deviation) ** 2 / variance  # of x_0 given x_t
        posterior = FULL.min_log_variance[t].exp() if t else torch.tensor(0.0)
        of_step = torch.log(posterior + FULL.mean_of_start[t] ** 2 * spread)
        low, high = FULL.min_log_variance[t], FULL.max_log_variance[t]
        place = 2 * (of_step - low) / (high - low) - 1 if high > low else torch.tensor(-1.0)
        for predicted in (expected, 0.9 * expected):
            output = torch.cat([predicted, place.expand(num, 1)], dim=-1)
            bits = FULL.losses(start, x, noise, steps, output)[1].mean().item()
            if predicted is expected:
                best += bits
            else:
                wrong += bits
    # Noise of 1,000 samples of each step; and levels are a little wider than the last step is sure.
    assert best == pytest.approx(entropy, abs=0.05)
    assert wrong > best + 0.2


# diffusers


def scheduler(spacing: int) -> DDPMScheduler:
    ddpm = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=False)
    ddpm.set_timesteps(timesteps=spaced_timesteps(spacing)[::-1])
    return ddpm


def test_diffusers_describes_the_same_process() -> None:
    ddpm = scheduler(100)
    # Its betas are ours in float32: 6e-8 of 1 - beta, a thousand times multiplied.
    torch.testing.assert_close(ddpm.alphas_cumprod.sqrt(), FULL.signal, rtol=3e-4, atol=0)
    start, noise = normal(6, C), normal(6, C, seed=1)
    t = torch.tensor([0, 1, 50, 300, 700, 990])
    torch.testing.assert_close(ddpm.add_noise(start, noise, t), FULL.add_noise(start, noise, t), rtol=0, atol=1e-5)
    output = normal(6, 2 * C, seed=2)
    for t_short in (1, 30, 60, 90):
        x = SHORT.add_noise(start, noise, t_short)
        reverse = SHORT.reverse(x, t_short, output)
        timestep = int(SHORT.timesteps[t_short])
        log_variance = ddpm._get_variance(timestep, predicted_variance=output[:, C:])
        torch.testing.assert_close(log_variance, reverse.log_variance, rtol=1e-3, atol=1e-3)
        step = ddpm.step(output, timestep, x, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(step.pred_original_sample, reverse.start, rtol=1e-3, atol=1e-3)
        ours = SHORT.step(x, t_short, output, normal(6, C, seed=3))
        torch.testing.assert_close(step.prev_sample, ours, rtol=1e-3, atol=1e-3)


def test_why_diffusers_does_not_carry_it() -> None:
    """Known bad for us: float32 products put the last signal off by more than its own rounding, 6e-8."""
    exact = float(np.sqrt(np.cumprod(1 - cosine_betas())[-1]))
    theirs, ours = float(scheduler(100).alphas_cumprod[-1].sqrt()), float(FULL.signal[-1])
    assert abs(ours / exact - 1) < 1e-7
    assert abs(theirs / exact - 1) > 1e-6


def test_a_process_made_in_sampling_can_be_trained_with() -> None:
    diffusion_process.cache_clear()
    with torch.inference_mode():
        process = diffusion_process(7)
    assert not process.signal.is_inference()
    assert diffusion_process(7) is process
