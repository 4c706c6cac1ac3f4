"""What was published, for tests to compare with: `official/README.md` says where it comes from."""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenbridge.results import ledger
from tokenbridge.results.ledger import Claim, Ledger

OFFICIAL = Path(__file__).parent / "official"

Shapes = dict[str, tuple[int, ...]]


@cache
def published_checkpoints() -> dict[str, Shapes]:
    """Return names and shapes of the parameters of every published checkpoint, by the model's official name."""
    with lzma.open(OFFICIAL / "state_dicts.json.xz", "rt", encoding="utf-8") as file:
        content = json.load(file)
    return {model: {name: tuple(shape) for name, shape in shapes.items()} for model, shapes in content.items()}


def published_shapes(model: str | None) -> Shapes:
    """Return names and shapes of the parameters of a published checkpoint."""
    assert model is not None, "the preset has no official name"
    return published_checkpoints()[model]


def published_numbers() -> dict[str, Any]:
    """Return the tables of the paper (v1), settings and scores of the READMEs, and counted parameters."""
    content: dict[str, Any] = yaml.safe_load((OFFICIAL / "published_numbers.yaml").read_text(encoding="utf-8"))
    return content


def publish(monkeypatch: pytest.MonkeyPatch, row: str, metrics: dict[str, float]) -> None:
    """Let the package's ledger claim these metrics of a row, and nothing else of it."""
    claims = [claim for claim in ledger.shipped_ledger().claims if claim.row != row]
    for name, value in metrics.items():
        facts: dict[str, Any] = {"id": f"{row}/{name}", "text": name, "source": "tests", "recipe": "none here"}
        claims.append(Claim(scale="paper", row=row, metric=name, value=value, **facts))
    changed = Ledger(claims=tuple(claims), discrepancies=())
    monkeypatch.setattr(ledger, "shipped_ledger", lambda: changed)
