"""Scale small: CIFAR-10, for one GPU. One step of each loss is tested, but no model has been trained yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokenbridge.configs.schema import Recipe, Scale, TrainingConfig
from tokenbridge.configs.tiny import _TINY_GENERATOR, _TINY_GIVT, _TINY_LLAMAGEN, _TINY_MAR, _autoencoder, _backbone
from tokenbridge.models.mar.sampling import MarSampling
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling

_SMALL_GENERATOR: dict[str, Any] = {
    **_TINY_GENERATOR,
    "latent_size": 8,
    "width": 384,
    "encoder_depth": 6,
    "decoder_depth": 6,
    "num_heads": 6,
    "num_buffer": 16,
    "head_width": 256,
    "head_depth": 3,
    "head_num_heads": 4,
    "dropout": 0.1,
}
_SMALL_AR64 = Recipe(
    name="tokenbridge-64",
    kind="tokenbridge",
    model=_SMALL_GENERATOR,
    training=TrainingConfig(num_steps=30_000, batch_size=256, learning_rate=8e-4, warmup_steps=1000, ema_decay=0.9995),
    loss={"num_loss_positions": 16, "mask_ratio_min": 0.0, "mask_ratio_std": 1.0},
    sampling=TokenBridgeSampling(
        num_iterations=64, guidance_scale=2.0, temperature=1.0, first_element="training-consistent"
    ),
)
_SMALL_WIDTHS = (64, 128, 128)
_SMALL_AUTOENCODER_TRAINING = TrainingConfig(
    num_steps=10_000, batch_size=128, learning_rate=1e-3, ema_decay=0.999, weight_decay=0.0
)

SMALL = Scale(
    name="small",
    data="cifar10",
    extractor="cifar10",
    image_size=32,
    channels=3,
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    with_mirrored=True,
    recipes=(
        Recipe(
            name="vae",
            kind="autoencoder",
            model=_autoencoder(3, 32, _SMALL_WIDTHS, latent_channels=16),
            training=_SMALL_AUTOENCODER_TRAINING,
            loss={"kl_weight": 0.001},
        ),
        Recipe(
            name="vq",
            kind="vq",
            model=_autoencoder(3, 32, _SMALL_WIDTHS, latent_channels=16, num_vq_embeddings=4096, vq_embed_dim=8),
            training=_SMALL_AUTOENCODER_TRAINING,
        ),
        Recipe(
            name="classifier",
            kind="classifier",
            model={"image_size": 32, "in_channels": 3, "num_classes": 10, "widths": (64, 128, 256, 256)},
            training=TrainingConfig(num_steps=6000, learning_rate=2e-3, ema_decay=0.999, weight_decay=0.05),
        ),
        _SMALL_AR64,
        replace(_SMALL_AR64, name="tokenbridge-16", model={**_SMALL_GENERATOR, "num_levels": 16}),
        replace(_SMALL_AR64, name="parallel-64", model={**_SMALL_GENERATOR, "head_type": "parallel"}),
        replace(
            _TINY_MAR,
            model={**_backbone(_SMALL_GENERATOR), "head_width": 448, "head_depth": 3},
            training=_SMALL_AR64.training,
            loss=_SMALL_AR64.loss,
            sampling=MarSampling(num_iterations=64, guidance_scale=2.0, num_diffusion_steps="ddim100"),
        ),
        replace(
            _TINY_GIVT,
            model={
                **{**_TINY_GIVT.model, "num_positions": 64, "dropout": 0.1},
                **{"width": 384, "depth": 14, "num_heads": 6, "mlp_width": 1536},
            },
            training=_SMALL_AR64.training,
        ),
        replace(
            _TINY_LLAMAGEN,
            model={
                **{"latent_size": 8, "num_codes": 4096, "num_classes": 10},
                **{"width": 384, "depth": 12, "num_heads": 6, "dropout": 0.1},
            },
            training=_SMALL_AR64.training,
        ),
    ),
)
"""CIFAR-10 on one GPU. Tests run one step of each loss; no model has been trained, so no weights are shipped yet."""
