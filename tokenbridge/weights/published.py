"""Presets: published models by name, with sizes and sampling settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from tokenbridge.utils.errors import UserError

Model = TypeVar("Model", bound=nn.Module)

OFFICIAL = "official"  # the README's settings: the default where there are any


@dataclass(frozen=True)
class SamplingRecipe:
    """How a preset was sampled, and who says so."""

    config: Any  # of the model's system: TokenBridgeSampling, MarSampling, ...
    source: str


@dataclass(frozen=True)
class Preset:
    """A model by name."""

    name: str
    model: Mapping[str, Any]  # keyword arguments of its class
    num_parameters: int  # expected; buffers are not counted
    official_name: str | None = None  # function of the official code that builds it
    sampling: Mapping[str, SamplingRecipe] = field(default_factory=dict)  # by name; the first is the default

    def sampling_config(self, variant: str | None = None) -> Any:
        """Return the settings called `variant`; the default ones if None.

        Raises:
            ValueError: there are none of that name, or none at all.
        """
        if not self.sampling:
            raise UserError(f"No sampling settings were published for {self.name}.")
        if variant is None:
            variant = next(iter(self.sampling))
        if variant not in self.sampling:
            raise UserError(f"{self.name} has no sampling settings {variant!r}; there are {list(self.sampling)}.")
        return self.sampling[variant].config


def find_preset(name: str, presets: Mapping[str, Preset]) -> Preset:
    """Return the preset of a system called `name`, by our name or the official one.

    Raises:
        ValueError: there is none.
    """
    for preset in presets.values():
        if name in (preset.name, preset.official_name):
            return preset
    raise UserError(f"Unknown preset {name!r}; there are {', '.join(presets)}.")


def build_preset(model_class: type[Model], preset: Preset, **changes: Any) -> Model:
    """Build a preset of any system on the meta device, in evaluation mode: sizes without memory.

    Args:
        model_class: of the preset's system.
        preset: which sizes.
        changes: keyword arguments of the class that replace the preset's; without any, the model must have the
            preset's number of parameters.
    """
    with torch.device("meta"):
        model = model_class(**{**preset.model, **changes}).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    expected = f"{preset.name} has {count:,} parameters, not the expected {preset.num_parameters:,}"
    assert changes or count == preset.num_parameters, expected
    return model
