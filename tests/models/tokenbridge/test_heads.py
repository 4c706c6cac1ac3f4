"""Heads: causality, the cached sampler against the plain forward pass, numbers of the official code."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from conftest import TINY, load_golden, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tokenbridge.models.layers import Attention
from tokenbridge.models.tokenbridge.heads import ARHead, FirstElement, HeadConfig, ParallelHead
from tokenbridge.models.tokenbridge.model import TokenBridge

C, V, W = TINY["num_channels"], TINY["num_levels"], TINY["width"]
FIRSTS: list[FirstElement] = ["official", "training-consistent"]
AR = cast("ARHead", tiny_model().head)
PARALLEL = cast("ParallelHead", tiny_model(head_type="parallel").head)

seeds = st.integers(0, 10**6)


def context_and_tokens(seed: int, n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, W, generator=generator), torch.randint(V, (n, C), generator=generator)


def cached_logits(head: ARHead, context: Tensor, tokens: Tensor, first: FirstElement) -> tuple[Tensor, Tensor]:
    """Run the sampler along given tokens: the logits it saw, and the log-probabilities it returned."""
    seen: list[Tensor] = []

    def pick(logits: Tensor, place: int) -> Tensor:
        assert place == len(seen)
        seen.append(logits)
        return tokens[:, place]

    chosen, log_probs = head.sample(context, pick, first=first)
    assert torch.equal(chosen, tokens)
    return torch.stack(seen, dim=1), log_probs


# AR head


@pytest.mark.parametrize("first", FIRSTS)
@given(seed=seeds)
@torch.no_grad()
def test_cached_sampler_equals_the_forward_pass(first: FirstElement, seed: int) -> None:
    context, tokens = context_and_tokens(seed)
    plain = AR.logits(context, tokens, first=first)
    cached, log_probs = cached_logits(AR, context, tokens, first)
    # The same sums in another order, in float32: about 1e-6 on logits of size 1.
    torch.testing.assert_close(cached, plain, atol=2e-5, rtol=1e-4)
    expected = plain.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(log_probs, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_cached_sampler_differs_along_other_tokens_or_first_elements() -> None:
    """Control for the test above: it would notice."""
    context, tokens = context_and_tokens(0)
    plain = AR.logits(context, tokens, first="official")
    cached, _ = cached_logits(AR, context, (tokens + 1) % V, "official")
    assert (cached - plain).abs().max() > 1e-2
    cached, _ = cached_logits(AR, context, tokens, "training-consistent")
    assert (cached - plain).abs().max() > 1e-2


@given(seeds, st.integers(0, C - 1), st.integers(1, V - 1))
@torch.no_grad()
def test_a_token_changes_only_the_logits_after_it(seed: int, place: int, shift: int) -> None:
    context, tokens = context_and_tokens(seed)
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + shift) % V
    before, after = AR.logits(context, tokens), AR.logits(context, changed)
    # What may not depend on the token is computed from equal numbers, up to how attention adds its zeros.
    torch.testing.assert_close(after[:, : place + 1], before[:, : place + 1], atol=1e-6, rtol=0)
    for later in range(place + 1, C):
        assert (after[:, later] - before[:, later]).abs().max() > 1e-4


@torch.no_grad()
def test_rows_do_not_see_each_other() -> None:
    context, tokens = context_and_tokens(0, n=5)
    alone = torch.cat([AR.logits(context[i : i + 1], tokens[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(AR.logits(context, tokens), alone, atol=1e-5, rtol=1e-4)  # other matmul shapes


def test_unknown_first_element_is_refused() -> None:
    context, tokens = context_and_tokens(0)
    with pytest.raises(ValueError, match="not 'other'"):
        AR.logits(context, tokens, first=cast("FirstElement", "other"))
    with pytest.raises(ValueError, match="not 'other'"):
        AR.sample(context, lambda logits, place: logits.argmax(-1), first=cast("FirstElement", "other"))


def test_width_must_divide_by_heads() -> None:
    with pytest.raises(ValueError, match="Width 32 is not divisible by 3 heads"):
        ARHead(HeadConfig(width=32, num_heads=3))


# Parallel head


@given(seeds)
@torch.no_grad()
def test_parallel_head_does_not_see_tokens(seed: int) -> None:
    context, tokens = context_and_tokens(seed)
    logits = PARALLEL.logits(context)
    assert logits.shape == (3, C, V)
    assert torch.equal(PARALLEL.logits(context, tokens), logits)
    assert torch.equal(PARALLEL.logits(context, (tokens + 1) % V, first="training-consistent"), logits)
    assert (PARALLEL.logits(context + 1) - logits).abs().max() > 1e-2


@torch.no_grad()
def test_parallel_head_samples_from_its_logits() -> None:
    context, tokens = context_and_tokens(0)
    logits = PARALLEL.logits(context)
    places: list[int] = []

    def pick(seen: Tensor, place: int) -> Tensor:
        places.append(place)
        assert torch.equal(seen, logits[:, place])
        return tokens[:, place]

    chosen, log_probs = PARALLEL.sample(context, pick)
    assert places == list(range(C))
    assert torch.equal(chosen, tokens)
    expected = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(log_probs, expected)


# Golden


def swap_scale_and_shift(head: ARHead) -> None:
    linear = cast("nn.Linear", head.channel_final.adaLN_modulation[1])
    for parameter in (linear.weight, linear.bias):
        parameter.copy_(parameter.roll(parameter.shape[0] // 2, 0))


def drop_timesteps(head: ARHead) -> None:
    head.timesteps_embeddings.zero_()


def drop_channel_embedding(head: ARHead) -> None:
    head.channel_embed.zero_()


def shift_token_embeddings(head: ARHead) -> None:
    head.token_embeddings = nn.ModuleList([head.token_embeddings[-1], *head.token_embeddings[:-1]])


def drop_query_norm(head: ARHead) -> None:
    for module in head.modules():
        if isinstance(module, Attention):
            module.q_norm = nn.Identity()


MUTATIONS: list[Callable[[ARHead], None]] = [
    swap_scale_and_shift,
    drop_timesteps,
    drop_channel_embedding,
    shift_token_embeddings,
    drop_query_norm,
]


@torch.no_grad()
def test_golden_sampling_logits() -> None:
    golden = load_golden("head-sampling-logits")
    head = cast("ARHead", golden.model().head)
    context, tokens = golden.inputs["features"], golden.inputs["tokens"]
    assert golden.close("logits", head.logits(context, tokens, first="official"))
    assert golden.close("logits", cached_logits(head, context, tokens, "official")[0])
    # Mutation: training starts the sequence without the timestep embedding.
    assert not golden.close("logits", head.logits(context, tokens, first="training-consistent"))
    assert not golden.close("logits", cached_logits(head, context, tokens, "training-consistent")[0])


@pytest.mark.parametrize("mutate", MUTATIONS)
@torch.no_grad()
def test_golden_sampling_logits_fail_for(mutate: Callable[[ARHead], None]) -> None:
    golden = load_golden("head-sampling-logits")
    head = cast("ARHead", golden.model().head)
    mutate(head)
    context, tokens = golden.inputs["features"], golden.inputs["tokens"]
    assert not golden.close("logits", head.logits(context, tokens, first="official"))
    assert not golden.close("logits", cached_logits(head, context, tokens, "official")[0])


# Initialisation


def test_initial_head_modulates_nothing() -> None:
    head = TokenBridge(**TINY).head
    for name, parameter in head.named_parameters():
        if "adaLN_modulation" in name:
            assert not parameter.any(), name
