"""Counted checks: exact where modules can be counted by hand, and no check says what it is asked to say."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tokenbridge.audit.audit import audit_claims
from tokenbridge.audit.checks import CHECKS, COUNTING_RULES, HEADS, count_grouped_head, count_head, distortion
from tokenbridge.models.tokenbridge.heads import ARHead, HeadConfig
from tokenbridge.results.ledger import read_ledger
from tokenbridge.tokenizers.quantizer import gaussian_quantizer
from tokenbridge.utils.files import reference_folder

LEDGER = read_ledger(reference_folder() / "paper")


def test_every_check_gives_a_number_and_is_asked_for() -> None:
    values = {name: check.run() for name, check in CHECKS.items()}
    assert all(math.isfinite(value) for value in values.values())
    asked = {claim.check for claim in LEDGER.claims} | {name for d in LEDGER.discrepancies for name in d.checks}
    rules = {name for name in CHECKS if name.startswith(("head/", "grouped-head/"))}  # a table of all combinations
    assert CHECKS.keys() - asked - rules == {"parameters/tokenbridge-tiny"}  # a preset of our own


@pytest.mark.parametrize(("width", "depth"), HEADS)
def test_head_is_counted_as_by_hand(width: int, depth: int) -> None:
    """16 channels of 64 levels behind a context of 1024, by the formula of its layers."""
    block = 12 * width**2 + 13 * width + width // 2  # attention (8 heads, norms of queries and keys), MLP, two norms
    modulation = 6 * (width**2 + width)
    plain, whole = count_head(width, depth, "plain-blocks"), count_head(width, depth, "blocks")
    assert plain == depth * block
    assert whole == depth * (block + modulation)
    condition, final_modulation, final_norm = 1024 * width + width, 2 * (width**2 + width), 2 * width
    embeddings, logits = (15 * 64 + 2 * 16) * width, 16 * (64 * width + 64)
    outside = condition + final_modulation + final_norm + embeddings + logits
    assert count_head(width, depth, "all") == whole + outside
    assert count_head(width, depth, "without-embeddings") == whole + outside - embeddings - logits
    assert count_head(width, depth, "without-modulation") == plain + outside - final_modulation
    sizes = [count_head(width, depth, rule) for rule in COUNTING_RULES]
    assert sizes[0] == max(sizes)
    assert sizes[-1] == min(sizes)


def test_grouping_channels_costs_outputs() -> None:
    sizes = [count_grouped_head(n, depth=3) for n in (1, 2, 4)]
    assert all(b > a for a, b in pairwise(sizes))
    config = HeadConfig(num_channels=4, num_levels=65536, context_width=768, width=1024, depth=3)
    with torch.device("meta"):
        assert sizes[2] == sum(p.numel() for p in ARHead(config).parameters())


@pytest.mark.parametrize("num_levels", [8, 16, 64])
def test_distortion_is_the_mean_over_draws(num_levels: int) -> None:
    """The values that stand for the normal distribution give what a million draws give."""
    draws = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    errors = (gaussian_quantizer(num_levels, value_range=5.0)(draws) - draws).square()
    assert distortion(num_levels, 5.0) == pytest.approx(errors.mean().item(), rel=0.02)


def test_a_wrong_count_turns_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every counted claim that is reproduced stands on its check: off by a per cent, or untrue, and it is not."""
    monkeypatch.chdir(reference_folder())
    right = {name: check.run() for name, check in CHECKS.items()}
    wrong = {name: (lambda value=value: 1.1 * value + 0.06) for name, value in right.items()}
    truth = {name: (lambda value=value: value) for name, value in right.items()}

    def reproduced(checks: dict[str, object]) -> set[str]:
        done = audit_claims(fail_on=(), checks=checks)  # type: ignore[arg-type]
        return {f.claim.id for f in done.findings if f.claim.scale == "counted" and f.verdict == "reproduced"}

    assert len(reproduced(truth)) > 60  # type: ignore[arg-type]
    assert reproduced(wrong) & reproduced(truth) == set()  # type: ignore[arg-type]
