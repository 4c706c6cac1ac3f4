"""The presets of all systems as a table shows them."""

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
    """A preset, as `tokenbridge models` shows it."""

    name: str
    system: str
    num_parameters: int
    num_tokens: int  # of an image
    token: str  # what one is
    source: str
    licence: str  # of the weights
    published: Mapping[str, float]  # scores: FID, IS, ...
    settings: Mapping[str, Mapping[str, Any]]  # of the sampler, by variant, each with its source


def list_presets() -> list[Listing]:
    """Return every preset of every system."""
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
