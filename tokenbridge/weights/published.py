"""Presets: published models by name, with their sizes and sampling settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from tokenbridge.utils.errors import UserError

Model = TypeVar("Model", bound=nn.Module)

OFFICIAL = "official"  # name of the settings in the official README, which are a preset's default


@dataclass(frozen=True)
class SamplingRecipe:
    """Published sampling settings of a preset, and where they were published."""

    config: Any  # an instance of the system's dataclass of settings: TokenBridgeSampling, MarSampling, ...
    source: str


@dataclass(frozen=True)
class Preset:
    """A model with a name: its sizes and its sampling settings."""

    name: str
    model: Mapping[str, Any]  # keyword arguments of the model's class
    num_parameters: int  # the expected number, without buffers
    official_name: str | None = None  # the name of this size in the official code; None if only this project has it
    sampling: Mapping[str, SamplingRecipe] = field(default_factory=dict)  # by name of the variant; the first is default

    def sampling_config(self, variant: str | None = None) -> Any:
        """Return the sampling settings called `variant`, or the default ones if it is None.

        Raises:
            UserError: no settings were published for this preset, or none of them are called `variant`.
        """
        if not self.sampling:
            raise UserError(f"No sampling settings were published for {self.name}.")
        if variant is None:
            variant = next(iter(self.sampling))
        if variant not in self.sampling:
            raise UserError(f"{self.name} has no sampling settings {variant!r}; there are {', '.join(self.sampling)}.")
        return self.sampling[variant].config


def find_preset(name: str, presets: Mapping[str, Preset]) -> Preset:
    """Return the preset of a system called `name`, which may be our name or the official one.

    Raises:
        UserError: no preset has this name.
    """
    for preset in presets.values():
        if name in (preset.name, preset.official_name):
            return preset
    raise UserError(f"Unknown preset {name!r}; there are {', '.join(presets)}.")


def build_preset(model_class: type[Model], preset: Preset, **changes: Any) -> Model:
    """Build the model of a preset on the meta device, in evaluation mode.

    Without changes, the number of parameters must be the one that the preset expects.

    Args:
        changes: keyword arguments of the model's class that replace those of the preset.
    """
    with torch.device("meta"):
        model = model_class(**{**preset.model, **changes}).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    expected = f"{preset.name} has {count:,} parameters, not the expected {preset.num_parameters:,}"
    assert changes or count == preset.num_parameters, expected
    return model
