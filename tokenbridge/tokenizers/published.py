"""The published autoencoders that the systems were trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from tokenbridge.tokenizers.givt_vae import GivtVAE, create_givt_vae, givt_vae_layout, load_givt_vae
from tokenbridge.tokenizers.kl16 import create_kl16, kl16_layout, load_kl16
from tokenbridge.tokenizers.llamagen_vq import LlamaGenVQ, create_vq, load_vq, vq_layout
from tokenbridge.weights.artifacts import KL16_VAE
from tokenbridge.weights.official import Layout


@dataclass(frozen=True)
class PublishedTokenizer:
    """A published autoencoder, which decodes the latents or tokens of a generator to images."""

    key: str  # key of its file in `weights.artifacts.ARTIFACTS`, and its name for `tokenbridge convert`
    part: str  # how messages call it
    model: Any  # its class
    create: Callable[[], Any]  # builds it on the meta device
    load: Callable[[Path], Any]  # loads it from the published file
    layout: Callable[[Any], Layout]  # returns the layout of the official tensors in a module of the class


KL16 = PublishedTokenizer(KL16_VAE, "VAE", AutoencoderKL, create_kl16, load_kl16, kl16_layout)
VQ16, VQ8 = (
    PublishedTokenizer(
        name, "VQ tokenizer", LlamaGenVQ, partial(create_vq, name), partial(load_vq, name=name), vq_layout
    )
    for name in ("llamagen-vq16", "llamagen-vq8")
)
GIVT_VAE = PublishedTokenizer("givt-vae", "VAE", GivtVAE, create_givt_vae, load_givt_vae, givt_vae_layout)
TOKENIZERS = {tokenizer.key: tokenizer for tokenizer in (KL16, VQ16, VQ8, GIVT_VAE)}
