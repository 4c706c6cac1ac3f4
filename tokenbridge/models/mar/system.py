"""The entry of MAR in the registry of systems."""

from __future__ import annotations

from tokenbridge.models.mar.checkpoint import load_mar, mar_layout
from tokenbridge.models.mar.cost import count_flop
from tokenbridge.models.mar.model import MAR, mar_loss
from tokenbridge.models.mar.presets import PRESETS
from tokenbridge.models.mar.sampling import MarSampling, generate
from tokenbridge.models.system import PRECISION_RECALL_NOTE, Evaluation, System
from tokenbridge.tokenizers.published import KL16

SYSTEM = System(
    name="mar",
    model=MAR,
    settings=MarSampling,
    generate=generate,
    loss=mar_loss,
    presets=PRESETS,
    default_size="l",
    layout=mar_layout,
    load=load_mar,
    has_average=True,
    tokenizer=KL16,
    describe_tokens=lambda sizes: (sizes["latent_size"] ** 2, f"a vector of {sizes['num_channels']}"),
    count_flop=count_flop,
    has_official_noise=True,
    compiled_part="backbone",
    # "ddim2" starts in the middle of the process. At its noisy end, random weights would give latents of 1e4, which
    # are too large for half precision.
    quick={"num_iterations": 2, "num_diffusion_steps": "ddim2"},
    evaluation=Evaluation(
        dtype="fp16",  # by autocast around generator and VAE (engine_mar.py)
        published="README.md of LTH14/mar at fe470ac",
        notes=(PRECISION_RECALL_NOTE,),
    ),
)
