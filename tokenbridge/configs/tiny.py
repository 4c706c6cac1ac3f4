"""Scale tiny: ten digits of 32 x 32 pixels, trained in minutes on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokenbridge.configs.schema import Recipe, Scale, TrainingConfig
from tokenbridge.models.givt.sampling import GivtSampling
from tokenbridge.models.llamagen.sampling import LlamaGenSampling
from tokenbridge.models.mar.sampling import MarSampling
from tokenbridge.models.tokenbridge.presets import PRESETS


def _autoencoder(channels: int, size: int, widths: tuple[int, ...], **extra: Any) -> dict[str, Any]:
    """Return the arguments that AutoencoderKL and VQModel share: one resolution for each width, and no attention."""
    return {
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": size,
        "mid_block_add_attention": False,
        **extra,
    }


def _backbone(tokenbridge: dict[str, Any]) -> dict[str, Any]:
    """Return those of TokenBridge's arguments that MAR shares: all except those of quantizer and head."""
    names = ("latent_size", "num_channels", "num_classes", "width", "encoder_depth", "decoder_depth", "num_heads")
    return {name: tokenbridge[name] for name in (*names, "num_buffer", "dropout")}


_TINY_GENERATOR: dict[str, Any] = dict(PRESETS["tokenbridge-tiny"].model)
_TINY_GENERATOR_TRAINING = TrainingConfig(
    num_steps=12_000, batch_size=64, learning_rate=1.5e-3, warmup_steps=200, ema_decay=0.999
)
_TINY_AR64 = Recipe(
    name="tokenbridge-64",
    kind="tokenbridge",
    model=_TINY_GENERATOR,
    training=_TINY_GENERATOR_TRAINING,
    # All mask ratios are about equally likely. The official ratios, at least 0.7, would never show the model more than
    # 4 of its 16 positions, while sampling ends with 15 visible ones. At 256 positions the official settings do well.
    loss={"num_loss_positions": 4, "mask_ratio_min": 0.0, "mask_ratio_std": 1.0},
    sampling=PRESETS["tokenbridge-tiny"].sampling_config(),
)
# The baselines have within 10 % of TokenBridge's 1,078,640 parameters and are trained with the same settings on equally
# many images. TokenBridge, MAR and GIVT are trained without their published dropout. LlamaGen is trained with dropout,
# because it soon memorises its short sequences of codes. With its dropout of 0.2, GIVT had a better negative
# log-likelihood on held-out digits (-14.5 instead of -7.2 nats per position), but worse samples at all settings.
_TINY_MAR = Recipe(
    name="mar",
    kind="mar",
    model={**_backbone(_TINY_GENERATOR), "head_width": 112, "head_depth": 3},  # 1,058,208
    training=_TINY_GENERATOR_TRAINING,
    loss=_TINY_AR64.loss,
    # "ddim100" has 100 steps that start at timestep 990. The official "100" starts at 999, where 1 / sqrt(alpha_bar) is
    # 2e4 and the first step multiplies an error of the noise by 300. The error of a head this small is 0.03: after
    # 4,500 training steps, its latents had a deviation of 263 instead of 1 (0.98 when starting at timestep 990).
    sampling=MarSampling(num_iterations=16, guidance_scale=2.5, temperature=1.0, num_diffusion_steps="ddim100"),
)
_TINY_GIVT = Recipe(
    name="givt",
    kind="givt",
    model={  # 979,280: all tiny weights stay below 15 MB
        **{"num_positions": 16, "num_channels": 16, "num_classes": 10, "num_components": 16},
        **{"width": 128, "depth": 5, "num_heads": 4, "mlp_width": 448, "dropout": 0.0},
    },
    training=_TINY_GENERATOR_TRAINING,
    sampling=GivtSampling(guidance_weight=0.4, temperature=0.3),
)
_TINY_LLAMAGEN = Recipe(
    name="llamagen",
    kind="llamagen",
    model={  # 985,600
        **{"latent_size": 4, "num_codes": 512, "num_classes": 10},
        **{"width": 128, "depth": 4, "num_heads": 4, "hidden_multiple": 128, "dropout": 0.1},
    },
    training=_TINY_GENERATOR_TRAINING,
    sampling=LlamaGenSampling(guidance_scale=1.5, temperature=0.95),
)
_TINY_WIDTHS = (16, 32, 48, 48)
_TINY_AUTOENCODER_TRAINING = TrainingConfig(num_steps=1500, learning_rate=2e-3, ema_decay=0.995, weight_decay=0.0)

TINY = Scale(
    name="tiny",
    data="digits",
    extractor="digits",
    image_size=32,
    channels=1,
    classes=tuple(str(n) for n in range(10)),
    with_mirrored=False,
    recipes=(
        Recipe(
            name="vae",
            kind="autoencoder",
            model=_autoencoder(1, 32, _TINY_WIDTHS, latent_channels=16),
            training=_TINY_AUTOENCODER_TRAINING,
            loss={"kl_weight": 1e-4},  # small, as in latent diffusion: with 0.01, 7 of the 16 channels are not used
        ),
        Recipe(
            name="vq",
            kind="vq",
            model=_autoencoder(1, 32, _TINY_WIDTHS, latent_channels=16, num_vq_embeddings=512, vq_embed_dim=8),
            training=_TINY_AUTOENCODER_TRAINING,
        ),
        Recipe(
            name="classifier",
            kind="classifier",
            model={"image_size": 32, "in_channels": 1, "num_classes": 10},
            training=TrainingConfig(
                num_steps=1500, batch_size=64, learning_rate=3e-3, ema_decay=0.995, weight_decay=0.05
            ),
        ),
        _TINY_AR64,
        replace(_TINY_AR64, name="parallel-64", model={**_TINY_GENERATOR, "head_type": "parallel"}),
        replace(_TINY_AR64, name="tokenbridge-16", model={**_TINY_GENERATOR, "num_levels": 16}),
        replace(_TINY_AR64, name="tokenbridge-64-natural", measured={"channel_order": "natural"}, optional=True),
        _TINY_MAR,
        _TINY_GIVT,
        _TINY_LLAMAGEN,
    ),
)
