"""TokenBridge: a reproducibility benchmark for token-based autoregressive image generation.

The names below load on first use, so that `import tokenbridge` is quick and says nothing of a broken torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenbridge.data import load_images as load_images
    from tokenbridge.generator import TokenBridge as TokenBridge
    from tokenbridge.metrics import score as score
    from tokenbridge.pipeline import TokenBridgePipeline as TokenBridgePipeline
    from tokenbridge.quantizer import gaussian_quantizer as gaussian_quantizer
    from tokenbridge.quantizer import lloyd_max_quantizer as lloyd_max_quantizer
    from tokenbridge.quantizer import measure_distortion as measure_distortion
    from tokenbridge.quantizer import uniform_quantizer as uniform_quantizer
    from tokenbridge.reproduce import reproduce as reproduce
    from tokenbridge.sampling import SamplingConfig as SamplingConfig
    from tokenbridge.sampling import generate_tokens as generate_tokens
    from tokenbridge.sampling import image_noise as image_noise
    from tokenbridge.tokenizers import LatentTokenizer as LatentTokenizer
    from tokenbridge.tokenizers import VQTokenizer as VQTokenizer

__version__ = "0.1.0"

_HOME = {
    "LatentTokenizer": "tokenizers",
    "SamplingConfig": "sampling",
    "TokenBridge": "generator",
    "TokenBridgePipeline": "pipeline",
    "VQTokenizer": "tokenizers",
    "gaussian_quantizer": "quantizer",
    "generate_tokens": "sampling",
    "image_noise": "sampling",
    "lloyd_max_quantizer": "quantizer",
    "load_images": "data",
    "measure_distortion": "quantizer",
    "reproduce": "reproduce",
    "score": "metrics",
    "uniform_quantizer": "quantizer",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that has it."""
    if name in _HOME:
        return getattr(importlib.import_module(f"tokenbridge.{_HOME[name]}"), name)
    raise AttributeError(f"module 'tokenbridge' has no attribute {name!r}")
