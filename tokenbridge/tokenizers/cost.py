"""The operations that decoding an image takes; `utils/flop.py` says what is counted."""

from __future__ import annotations

from typing import Any

from diffusers import VQModel

from tokenbridge.tokenizers.llamagen_vq import LlamaGenVQ
from tokenbridge.utils.flop import count, placeholder


def decoder_flop(autoencoder: Any, latent_size: int) -> int:
    """Return the operations of decoding one image.

    Args:
        autoencoder: an autoencoder of diffusers, a `GivtVAE` or a `LlamaGenVQ`, on the meta device.
        latent_size: height and width of the latents.
    """
    config = autoencoder.config
    channels = config.get("code_channels") or config.get("vq_embed_dim") or config["latent_channels"]
    latents = placeholder(1, channels, latent_size, latent_size)
    if isinstance(autoencoder, LlamaGenVQ):
        return count(lambda: autoencoder.raw_images(latents))
    options = {"force_not_quantize": True} if isinstance(autoencoder, VQModel) else {}
    return count(lambda: autoencoder.decode(latents, **options))
