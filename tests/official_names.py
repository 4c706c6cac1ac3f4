"""Official state dicts of any of the modules here, by the layout of its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor, nn

from tokenbridge.models.givt.checkpoint import givt_layout
from tokenbridge.models.givt.model import GIVT
from tokenbridge.models.llamagen.checkpoint import llamagen_layout
from tokenbridge.models.llamagen.model import LlamaGen
from tokenbridge.models.mar.checkpoint import mar_layout
from tokenbridge.models.mar.model import MAR
from tokenbridge.models.tokenbridge.checkpoint import tokenbridge_layout
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.tokenizers.givt_vae import GivtVAE, givt_vae_layout
from tokenbridge.tokenizers.kl16 import kl16_layout
from tokenbridge.tokenizers.llamagen_vq import LlamaGenVQ, vq_layout
from tokenbridge.weights import official, rule
from tokenbridge.weights.official import Layout, flat_layout

LAYOUTS: dict[type[nn.Module], Callable[[Any], Layout]] = {
    TokenBridge: tokenbridge_layout,
    MAR: mar_layout,
    LlamaGen: llamagen_layout,
    GIVT: givt_layout,
    AutoencoderKL: kl16_layout,
    LlamaGenVQ: vq_layout,
    GivtVAE: givt_vae_layout,
}


def layout(module: nn.Module) -> Layout:
    """Return the layout of a module; parts of a model have the official names."""
    return LAYOUTS.get(type(module), flat_layout)(module)


def to_official(module: nn.Module) -> dict[str, Tensor]:
    return official.to_official(module, layout(module))


def from_official(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return official.from_official(module, state, layout(module))


def load_official(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    official.load_official(module, state, layout(module))


def rule_state(module: nn.Module, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the official state dict that the goldens' rule draws for a module."""
    return rule.rule_state(layout(module), weights)


def with_rule_weights(module: Any, weights: Mapping[str, Any]) -> Any:
    """Give a module weights by the goldens' rule, in evaluation mode."""
    load_official(module, rule_state(module, weights))
    return module.eval()
