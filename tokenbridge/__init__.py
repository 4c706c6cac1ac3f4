"""TokenBridge: a reproducibility benchmark for token-based autoregressive image generation.

The names below load on first use, so that `import tokenbridge` is quick and says nothing of a broken torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenbridge.audit import audit as audit
    from tokenbridge.audit import audit_samples as audit_samples
    from tokenbridge.audit_report import write_report as write_report
    from tokenbridge.claims import read_ledger as read_ledger
    from tokenbridge.data import load_images as load_images
    from tokenbridge.discrepancies import measure_discrepancies as measure_discrepancies
    from tokenbridge.evaluation import evaluate as evaluate
    from tokenbridge.evaluation import make_reference as make_reference
    from tokenbridge.experiment import train_recipe as train_recipe
    from tokenbridge.gate import run_gate as run_gate
    from tokenbridge.generator import TokenBridge as TokenBridge
    from tokenbridge.metrics import score as score
    from tokenbridge.pipeline import TokenBridgePipeline as TokenBridgePipeline
    from tokenbridge.quantizer import gaussian_quantizer as gaussian_quantizer
    from tokenbridge.quantizer import lloyd_max_quantizer as lloyd_max_quantizer
    from tokenbridge.quantizer import measure_distortion as measure_distortion
    from tokenbridge.quantizer import uniform_quantizer as uniform_quantizer
    from tokenbridge.reconstruction import reconstruct as reconstruct
    from tokenbridge.reproduce import reproduce as reproduce
    from tokenbridge.sampling import SamplingConfig as SamplingConfig
    from tokenbridge.sampling import generate_tokens as generate_tokens
    from tokenbridge.sampling import image_noise as image_noise
    from tokenbridge.systems import convert as convert
    from tokenbridge.systems import sample as sample
    from tokenbridge.table1 import reproduce_table1 as reproduce_table1
    from tokenbridge.table3 import reproduce_table3 as reproduce_table3
    from tokenbridge.tokenizers import LatentTokenizer as LatentTokenizer
    from tokenbridge.tokenizers import VQTokenizer as VQTokenizer

__version__ = "0.1.0"

_HOME = {
    "LatentTokenizer": "tokenizers",
    "SamplingConfig": "sampling",
    "TokenBridge": "generator",
    "TokenBridgePipeline": "pipeline",
    "VQTokenizer": "tokenizers",
    "audit": "audit",
    "audit_samples": "audit",
    "convert": "systems",
    "evaluate": "evaluation",
    "gaussian_quantizer": "quantizer",
    "generate_tokens": "sampling",
    "image_noise": "sampling",
    "lloyd_max_quantizer": "quantizer",
    "load_images": "data",
    "make_reference": "evaluation",
    "measure_discrepancies": "discrepancies",
    "measure_distortion": "quantizer",
    "read_ledger": "claims",
    "reconstruct": "reconstruction",
    "reproduce": "reproduce",
    "reproduce_table1": "table1",
    "reproduce_table3": "table3",
    "run_gate": "gate",
    "sample": "systems",
    "score": "metrics",
    "train_recipe": "experiment",
    "uniform_quantizer": "quantizer",
    "write_report": "audit_report",
}
__all__ = ["__version__", *_HOME]


class CalledByName(ModuleType):
    """A module that is called as its function of the same name, as `tokenbridge.audit(...)`.

    Python sets a package's attribute to a module when it is imported from anywhere: the function alone would be there
    or not by the order of imports.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the function."""
        return getattr(self, self.__name__.rpartition(".")[2])(*arguments, **options)


def __getattr__(name: str) -> Any:
    """Load a public name from the module that has it."""
    if name in _HOME:
        module = importlib.import_module(f"tokenbridge.{_HOME[name]}")
        return module if name == _HOME[name] else getattr(module, name)
    raise AttributeError(f"module 'tokenbridge' has no attribute {name!r}")
