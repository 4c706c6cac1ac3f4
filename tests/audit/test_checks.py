"""Counted checks: exact where modules can be counted by hand, and no check says what it is asked to say."""

from __future__ import annotations

import math
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from published import published_numbers

from tokenbridge.audit.audit import audit_claims
from tokenbridge.audit.checks import (
    COUNTING_RULES,
    HEADS,
    _counted,
    all_checks,
    count_grouped_head,
    count_head,
    distortion,
)
from tokenbridge.models.tokenbridge.heads import ARHead, HeadConfig
from tokenbridge.results.ledger import Ledger, read_ledger
from tokenbridge.results.verdicts import judge
from tokenbridge.tokenizers.quantizer import gaussian_quantizer
from tokenbridge.utils.files import reference_folder

PAPER = reference_folder() / "paper"
LEDGER = read_ledger(PAPER)
CHECKS = all_checks(LEDGER)
INGREDIENTS = {  # facts that others are computed from
    "official/base-learning-rate",
    "official/base-batch-size",
    "official/images-per-gpu",
    "official/gpus",
    "table2d/levels",
}


TABLE2D = {"table2d/1/classes", "table2d/2/classes", "table2d/4/classes", "table2d/4/params"}  # small heads hardly grow


def test_every_check_gives_a_number_and_is_asked_for() -> None:
    values = {name: check() for name, check in CHECKS.items()}
    assert all(math.isfinite(value) for value in values.values())
    asked = {claim.check for claim in LEDGER.claims} | {name for d in LEDGER.discrepancies for name in d.checks}
    rules = {name for name in CHECKS if name.startswith(("head/", "grouped-head/"))}  # a table of all combinations
    assert CHECKS.keys() - asked - rules == INGREDIENTS | {"parameters/tokenbridge-tiny"}  # a preset of our own


def test_facts_are_those_of_the_official_code() -> None:
    """The ledger's facts against the repository's own list, where that has them."""
    commands = published_numbers()["official_commands"]["tokenbridge_training"]
    names = {"blr": "base-learning-rate", "batch_per_gpu": "images-per-gpu", "gpus": "gpus", "epochs": "epochs"}
    names |= {"warmup_epochs": "warmup-epochs", "grad_clip": "grad-clip", "weight_decay": "weight-decay", "ema": "ema"}
    assert {key: LEDGER.fact(f"official/{name}") for key, name in names.items()} == {
        key: commands[key] for key in names
    }
    assert LEDGER.fact("official/is-adamw") == 1
    assert LEDGER.fact("official/is-bfloat16") == 0


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("official.yaml", "value: 0.02", "value: 0.03", {"table4/training/weight-decay"}),
        ("official.yaml", "value: 32", "value: 31", {"table4/training/batch-size"}),
        ("official.yaml", "value: 16", "value: 17", TABLE2D),
        ("table5.yaml", "value: 52.42", "value: 52.52", {"table5/speed-up"}),
        ("table1.yaml", "value: 1.33", "value: 1.43", {"table1a/ptq-16/difference"}),
    ],
)
def test_what_a_claim_is_compared_with_is_in_the_ledger(
    tmp_path: Path, file: str, old: str, new: str, changed: set[str]
) -> None:
    """Another number in the YAML turns the verdicts that rest on it, and no other: none is written in Python."""
    shutil.copytree(PAPER, tmp_path / "paper")
    text = (PAPER / file).read_text()
    assert text.count(old) == 1
    (tmp_path / "paper" / file).write_text(text.replace(old, new))
    counted = _counted().keys()

    def reproduced(ledger: Ledger) -> set[str]:
        checks = all_checks(ledger)
        judged = [claim for claim in ledger.claims if claim.check is not None and claim.check not in counted]
        return {
            claim.id
            for claim in judged
            if judge(1.0 if claim.value is None else claim.value, checks[str(claim.check)](), claim.tolerance)
            == "reproduced"
        }

    assert reproduced(LEDGER) - reproduced(read_ledger(tmp_path / "paper")) == changed


def test_a_number_that_a_check_needs_and_the_ledger_lacks() -> None:
    check = all_checks(Ledger())["speed-up"]
    with pytest.raises(ValueError, match="no value 'table5/mar/ms'"):
        check()


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
    sizes = [count_grouped_head(n, depth=3, num_levels=16) for n in (1, 2, 4)]
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
    right = {name: check() for name, check in CHECKS.items()}
    wrong = {name: (lambda value=value: 1.1 * value + 0.06) for name, value in right.items()}
    truth = {name: (lambda value=value: value) for name, value in right.items()}

    def reproduced(checks: dict[str, object]) -> set[str]:
        done = audit_claims(fail_on=(), checks=checks)  # type: ignore[arg-type]
        return {f.claim.id for f in done.findings if f.claim.scale == "counted" and f.verdict == "reproduced"}

    assert len(reproduced(truth)) > 60  # type: ignore[arg-type]
    assert reproduced(wrong) & reproduced(truth) == set()  # type: ignore[arg-type]
