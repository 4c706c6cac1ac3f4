"""The entry of LlamaGen in the registry of systems."""

from __future__ import annotations

from torch import Tensor

from tokenbridge.models.llamagen.checkpoint import llamagen_layout, load_llamagen
from tokenbridge.models.llamagen.cost import count_flop
from tokenbridge.models.llamagen.model import LlamaGen, llamagen_loss
from tokenbridge.models.llamagen.presets import PRESETS
from tokenbridge.models.llamagen.sampling import LlamaGenSampling, generate
from tokenbridge.models.system import Evaluation, System
from tokenbridge.tokenizers.published import VQ16


def _to_grid(model: LlamaGen, tokens: Tensor) -> Tensor:
    return tokens.unflatten(1, (model.latent_size, model.latent_size))


SYSTEM = System(
    name="llamagen",
    model=LlamaGen,
    settings=LlamaGenSampling,
    generate=generate,
    to_latents=_to_grid,
    codes=True,
    loss=llamagen_loss,
    presets=PRESETS,
    default_size="3b",
    layout=llamagen_layout,
    load=load_llamagen,
    tokenizer=VQ16,
    describe_tokens=lambda sizes: (sizes["latent_size"] ** 2, f"one of {sizes['num_codes']:,} codes"),
    count_flop=count_flop,
    has_official_noise=True,
    casts_weights=True,  # those of the GPT; the tokenizer stays in float32
    evaluation=Evaluation(
        dtype="bf16",  # the type of the GPT's weights; the tokenizer is in float32 (sample_c2i_ddp.py)
        published="README.md of FoundationVision/LlamaGen at ce98ec4",
        labels="random",
        notes=(
            "The published FID is by ADM's TensorFlow evaluator; ours by torch-fidelity's port of its Inception.",
            "Other scores as published: TokenBridge's table 3 (arXiv 2503.16430 v1).",
            "Labels are random and not balanced, as in sample_c2i_ddp.py; images of 384 pixels are scaled to 256.",
            "The official script seeds with its seed times the number of processes, plus rank; here with seed plus "
            "rank. The two agree at seed 0, its default.",
        ),
    ),
)
