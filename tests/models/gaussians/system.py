"""The Gaussians as a system."""

from __future__ import annotations

from tokenbridge.models.system import Evaluation, System
from tokenbridge.tokenizers.published import KL16
from tokenbridge.weights.official import flat_layout

from .checkpoint import load_gaussians
from .cost import count_flop
from .model import Gaussians, gaussians_loss
from .presets import PRESETS
from .sampling import GaussiansSampling, generate

SYSTEM = System(
    name="gaussians",
    model=Gaussians,
    settings=GaussiansSampling,
    generate=generate,
    loss=gaussians_loss,
    presets=PRESETS,
    default_size="s",
    layout=flat_layout,
    load=load_gaussians,
    tokenizer=KL16,
    describe_tokens=lambda sizes: (sizes["latent_size"] ** 2, f"a vector of {sizes['num_channels']}"),
    count_flop=count_flop,
    evaluation=Evaluation(dtype="fp32", published="nowhere"),
)
