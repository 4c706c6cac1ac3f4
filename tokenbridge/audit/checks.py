"""Checks that need no trained weights: parameters counted from our modules, and the paper's arithmetic.

Each returns one number, in a second or less; nothing is allocated, models are built on the meta device. Claims name
the checks that decide them (`reference_results/paper/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from tokenbridge.models.llamagen.model import LlamaGen
from tokenbridge.models.llamagen.presets import SIZES
from tokenbridge.models.registry import all_presets
from tokenbridge.models.tokenbridge.heads import ARHead, HeadConfig
from tokenbridge.models.tokenbridge.presets import PRESETS
from tokenbridge.tokenizers.distortion import measure_distortion
from tokenbridge.tokenizers.givt_vae import create_givt_vae
from tokenbridge.tokenizers.kl16 import create_kl16
from tokenbridge.tokenizers.llamagen_vq import create_vq
from tokenbridge.tokenizers.quantizer import gaussian_quantizer
from tokenbridge.weights.published import build_preset

HEADS = ((256, 3), (512, 3), (512, 4), (1024, 4), (1024, 6))  # width, depth of table 2e
CHANNELS_PER_GROUP = (1, 2, 4)  # table 2d
COUNTING_RULES = {
    "all": "everything",
    "without-embeddings": "no token or channel embeddings and no output layers",
    "without-modulation": "everything but the modulation of blocks and final layer",
    "blocks": "transformer blocks with their modulation",
    "plain-blocks": "transformer blocks without modulation",
}
"""Ways to count a head's parameters that could explain the printed ones."""


@dataclass(frozen=True)
class Check:
    """A number that is computed, not trained for."""

    what: str
    run: Callable[[], float]


def count(module: nn.Module) -> float:
    """Return the number of parameters; buffers are not counted."""
    return float(sum(parameter.numel() for parameter in module.parameters()))


def count_head(width: int, depth: int, rule: str, *, context_width: int = 1024) -> float:
    """Return the parameters of an AR head for 16 channels of 64 levels.

    Args:
        width: of its blocks.
        depth: number of blocks.
        rule: of `COUNTING_RULES`.
        context_width: of the backbone; 1024 for L.
    """
    with torch.device("meta"):
        head = ARHead(HeadConfig(context_width=context_width, width=width, depth=depth))
    embeddings = ("token_embeddings", "channel_embed", "timesteps_embeddings", "channel_heads")
    left_out: Callable[[str], bool] = {
        "all": lambda name: False,
        "without-embeddings": lambda name: name.startswith(embeddings),
        "without-modulation": lambda name: "adaLN" in name,
        "blocks": lambda name: not name.startswith("channel_blocks"),
        "plain-blocks": lambda name: not name.startswith("channel_blocks") or "adaLN" in name,
    }[rule]
    return float(sum(p.numel() for name, p in head.named_parameters() if not left_out(name)))


def count_grouped_head(per_group: int, *, depth: int) -> float:
    """Return the parameters of the head of table 2d: channels predicted by groups, by one joint softmax each.

    Counted as our head for 16 / `per_group` channels with 16^`per_group` levels, 1024 wide, on the base backbone
    (768). The paper does not say how deep it was.

    Args:
        per_group: channels of a group; 16 levels each.
        depth: number of blocks.
    """
    groups, classes = 16 // per_group, 16**per_group
    config = HeadConfig(num_channels=groups, num_levels=classes, context_width=768, width=1024, depth=depth)
    with torch.device("meta"):
        return count(ARHead(config))


def count_backbone() -> float:
    """Return the parameters of TokenBridge-B without its head, which table 2d calls the 172M backbone."""
    return _size("tokenbridge-b") - _size("tokenbridge-b", "head")


def distortion(num_levels: int, value_range: float) -> float:
    """Return the quantiser's mean squared error on a standard normal distribution (2^20 evenly probable values)."""
    probabilities = (torch.arange(2**20, dtype=torch.float64) + 0.5) / 2**20
    values = math.sqrt(2) * torch.erfinv(2 * probabilities - 1)
    return measure_distortion(gaussian_quantizer(num_levels, value_range=value_range), values.float()).relative_mse


def _size(name: str, part: str | None = None) -> float:
    kind, preset = all_presets()[name]
    model = build_preset(kind.model, preset)
    return count(model if part is None else model.get_submodule(part))


def _size_of_part(create: Callable[[], nn.Module], part: str) -> float:
    with torch.device("meta"):
        return count(create().get_submodule(part))


def _size_of_xxxl() -> float:
    with torch.device("meta"):
        return count(LlamaGen(**SIZES["GPT-XXXL"]))


def _width(name: str) -> float:
    return float(PRESETS[name].model["width"])


def _blocks(name: str) -> float:
    return float(PRESETS[name].model["encoder_depth"] + PRESETS[name].model["decoder_depth"])


def _range_order() -> bool:
    errors = [distortion(64, float(value_range)) for value_range in (2, 3, 4, 5)]
    return errors == sorted(errors, reverse=True)


_PUBLISHED = ("tokenbridge-l", "tokenbridge-h")
CHECKS: dict[str, Check] = {
    **{f"parameters/{name}": Check(f"parameters of {name}", partial(_size, name)) for name in all_presets()},
    **{
        f"parameters/{name}-head": Check(f"head of {name}", partial(_size, name, "head"))
        for name in ("tokenbridge-b", "tokenbridge-l", "tokenbridge-h", "mar-b", "mar-l", "mar-h")
    },
    **{
        f"parameters/{name}-{part}": Check(f"{part} of {name}", partial(_size_of_part, create, part))
        for name, create in (("kl16", create_kl16), ("givt-vae", create_givt_vae))
        for part in ("encoder", "decoder")
    },
    "parameters/llamagen-xxxl": Check("LlamaGen's GPT-XXXL, of which no weights were published", _size_of_xxxl),
    "parameters/kl16": Check("parameters of the KL-16 VAE", lambda: count(create_kl16())),
    "parameters/llamagen-vq16": Check("parameters of VQ-16", lambda: count(create_vq("llamagen-vq16"))),
    "parameters/givt-vae": Check("parameters of GIVT's VAE", lambda: count(create_givt_vae())),
    "parameters/tokenbridge-b-backbone": Check("TokenBridge-B without its head", count_backbone),
    **{
        f"head/{width}x{depth}/{rule}": Check(
            f"head {width} wide, {depth} deep, on L: {words}", partial(count_head, width, depth, rule)
        )
        for width, depth in HEADS
        for rule, words in COUNTING_RULES.items()
    },
    **{
        f"grouped-head/{n}/depth-{depth}": Check(
            f"head of groups of {n}, {depth} deep", partial(count_grouped_head, n, depth=depth)
        )
        for n in CHANNELS_PER_GROUP
        for depth in (3, 4)
    },
    **{f"classes/{n}": Check(f"classes of {n} channels of 16 levels", partial(pow, 16.0, n)) for n in (1, 2, 4)},
    "speed-up": Check("311.25 ms over 52.42 ms (table 5)", lambda: 311.25 / 52.42),
    "rfid-of-16-levels": Check("1.33 - 1.11 (table 1a)", lambda: 1.33 - 1.11),
    "learning-rate": Check("5e-5 x 2048 / 256, the README's command", lambda: 5e-5 * 2048 / 256),
    "batch-size": Check("64 images on each of 32 GPUs, the README's command", lambda: 64.0 * 32),
    **{
        f"official/{name}": Check(f"{name.replace('-', ' ')}, {source}", partial(float, value))
        for name, value, source in (
            # YuqingWang1029/TokenBridge at 3ede281.
            ("weight-decay", 0.02, "main_tokenbridge.py"),
            ("beta-1", 0.9, "main_tokenbridge.py"),
            ("beta-2", 0.95, "main_tokenbridge.py"),
            ("warmup-epochs", 100, "main_tokenbridge.py and the README's command"),
            ("epochs", 400, "main_tokenbridge.py; the README trains L for 400"),
            ("grad-clip", 3.0, "main_tokenbridge.py"),
            ("ema", 0.9999, "main_tokenbridge.py"),
            ("dropout", 0.1, "main_tokenbridge.py, --proj_dropout"),
            ("attention-dropout", 0.1, "main_tokenbridge.py, --attn_dropout"),
            ("label-dropout", 0.1, "main_tokenbridge.py, --label_drop_prob"),
        )
    },
    # 1 is true. engine_tokenbridge.py trains under torch.cuda.amp.autocast(), whose default is float16.
    "official/is-adamw": Check("AdamW, main_tokenbridge.py", lambda: 1.0),
    "official/is-cosine": Check("cosine, default of main_tokenbridge.py", lambda: 1.0),
    "official/is-bfloat16": Check("bfloat16, engine_tokenbridge.py: float16", lambda: 0.0),
    "official/final-learning-rate": Check("--min_lr, main_tokenbridge.py", lambda: 0.0),
    "fewer-than-mar-h": Check(
        "TokenBridge-H has fewer parameters than MAR-H", lambda: float(_size("tokenbridge-h") < _size("mar-h"))
    ),
    **{f"width/{n}": Check(f"width of {n}", partial(_width, n)) for n in _PUBLISHED},
    **{f"blocks/{n}": Check(f"blocks of {n}", partial(_blocks, n)) for n in _PUBLISHED},
    "distortion/order-of-ranges": Check("MSE falls from range 2 to 5", lambda: float(_range_order())),
    **{
        f"sampling/{name}/{key}": Check(
            f"{key.replace('_', ' ')} of the official command for {name}",
            partial(lambda preset, key: float(getattr(preset.sampling_config(), key)), PRESETS[name], key),
        )
        for name in _PUBLISHED
        for key in ("temperature", "guidance_scale")
    },
    **{
        f"distortion/{levels}-levels": Check(
            f"MSE on N(0, 1), {levels} levels, range 5", partial(distortion, levels, 5.0)
        )
        for levels in (8, 16, 32, 64)
    },
}
"""All checks by name."""
