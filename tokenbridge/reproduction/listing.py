"""The list of presets that `tokenbridge models` shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokenbridge.models.registry import SHIPPED_PRESETS, all_presets
from tokenbridge.models.system import System
from tokenbridge.results.ledger import published_metrics
from tokenbridge.results.score import read_name
from tokenbridge.weights.artifacts import ARTIFACTS
from tokenbridge.weights.published import Preset

SHIPPED_LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class Listing:
    """The entry of a preset."""

    name: str
    system: str
    num_parameters: int
    num_tokens: int  # tokens of an image
    token: str  # what a token is
    source: str
    licence: str  # licence of the weights
    published: Mapping[str, float]  # published scores: FID, IS, ...
    settings: Mapping[str, Mapping[str, Any]]  # sampling settings by variant, each with its source


def list_presets() -> list[Listing]:
    """Return the entries of all presets of all systems."""
    return [_listing(system, preset) for system, preset in all_presets().values()]


def _listing(system: System, preset: Preset) -> Listing:
    num_tokens, token = system.describe_tokens(preset.model)
    metrics = published_metrics(f"table3/{preset.name}")
    published = {read_name(name).metric: value for name, value in metrics.items()}
    artifact = ARTIFACTS.get(preset.name)
    if preset.name in SHIPPED_PRESETS:
        source, licence = "shipped with this package", SHIPPED_LICENCE
    else:
        source = artifact.origin if artifact else "not published"
        licence = artifact.licence if artifact else "–"
    settings = {name: {**asdict(recipe.config), "source": recipe.source} for name, recipe in preset.sampling.items()}
    return Listing(
        preset.name, system.name, preset.num_parameters, num_tokens, token, source, licence, published, settings
    )
