"""Autoencoders of diffusers' classes, as small as tests need."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel


def tiny_kl(**changes: Any) -> AutoencoderKL:
    """Return a random KL autoencoder of factor 4 with 6 latent channels."""
    torch.manual_seed(0)
    defaults = {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 6,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "scaling_factor": 2.0,
        "shift_factor": 0.25,
    }
    return AutoencoderKL(**{**defaults, **changes}).eval()


def tiny_taesd() -> AutoencoderTiny:
    """Return a random AutoencoderTiny of factor 4 with 4 latent channels."""
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).eval()


def tiny_vq() -> VQModel:
    """Return a random VQ model of factor 4 with 12 codes of 3 values, spread over the latents' range."""
    torch.manual_seed(0)
    model = VQModel(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=3,
        num_vq_embeddings=12,
        norm_num_groups=4,
    ).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)  # at ± 1/12, as made, one code would win everywhere
    return model
