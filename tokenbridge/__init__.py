"""TokenBridge: a reproducibility benchmark for token-based autoregressive image generation.

The public names are listed in `__init__.pyi`. Each is imported at its first use, so that `import tokenbridge` is quick,
and the command can report a broken installation of torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
