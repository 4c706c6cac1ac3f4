"""Checks that need no trained weights: they count our modules, compute with published numbers, or state facts.

Each check returns one number in a second or less, because models are built on the meta device without memory. Claims
name the checks that decide them (`reference_results/paper/`). Published numbers stand there and never here: a check
counts our own modules, or computes with the numbers of the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from tokenbridge.models.llamagen.model import LlamaGen
from tokenbridge.models.llamagen.presets import SIZES
from tokenbridge.models.registry import all_presets
from tokenbridge.models.tokenbridge.heads import ARHead, HeadConfig
from tokenbridge.models.tokenbridge.presets import PRESETS, create_model
from tokenbridge.results.ledger import Ledger
from tokenbridge.tokenizers.distortion import measure_distortion
from tokenbridge.tokenizers.givt_vae import create_givt_vae
from tokenbridge.tokenizers.kl16 import create_kl16
from tokenbridge.tokenizers.llamagen_vq import create_vq
from tokenbridge.tokenizers.quantizer import gaussian_quantizer
from tokenbridge.weights.published import build_preset

HEADS = ((256, 3), (512, 3), (512, 4), (1024, 4), (1024, 6))  # width, depth of table 2e
CHANNELS_PER_GROUP = (1, 2, 4)  # table 2d
COUNTING_RULES = (  # ways to count the parameters of a head that could explain the printed numbers
    "all",
    "without-embeddings",  # without token embeddings, channel embeddings and output layers
    "without-modulation",  # everything but the modulation of blocks and final layer
    "blocks",  # transformer blocks with their modulation
    "plain-blocks",  # transformer blocks without modulation
)


def count(module: nn.Module) -> float:
    """Return the number of parameters without buffers."""
    return float(sum(parameter.numel() for parameter in module.parameters()))


def count_head(width: int, depth: int, rule: str, *, context_width: int = 1024) -> float:
    """Return the number of parameters of an AR head for 16 channels with 64 levels.

    Args:
        width: the width of the blocks.
        depth: the number of blocks.
        rule: one of `COUNTING_RULES`.
        context_width: the width of the backbone, 1024 for L.
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


def count_grouped_head(per_group: int, *, depth: int, num_levels: int) -> float:
    """Return the number of parameters of the head of table 2d, which predicts a group of channels by one joint softmax.

    It is counted as our head for 16 / `per_group` channels with `num_levels`^`per_group` levels, 1024 wide, on the base
    backbone (768). The paper does not say how deep it was.

    Args:
        per_group: channels in a group.
        depth: the number of blocks.
        num_levels: levels of every channel.
    """
    groups, classes = 16 // per_group, num_levels**per_group
    config = HeadConfig(num_channels=groups, num_levels=classes, context_width=768, width=1024, depth=depth)
    with torch.device("meta"):
        return count(ARHead(config))


def count_backbone() -> float:
    """Return the number of parameters of TokenBridge-B without its head, which table 2d calls the 172M backbone."""
    return _size("tokenbridge-b") - _size("tokenbridge-b", "head")


def distortion(num_levels: int, value_range: float) -> float:
    """Return the quantiser's mean squared error on a standard normal distribution (2^20 equally probable values)."""
    probabilities = (torch.arange(2**20, dtype=torch.float64) + 0.5) / 2**20
    values = math.sqrt(2) * torch.erfinv(2 * probabilities - 1)
    return measure_distortion(gaussian_quantizer(num_levels, value_range=value_range), values.float()).relative_mse


def all_checks(ledger: Ledger) -> dict[str, Callable[[], float]]:
    """Return all checks by name. Facts of the ledger are checks under their ids, with 1 for true."""
    facts = {fact.id: partial(ledger.fact, fact.id) for fact in ledger.facts}
    return {**_counted(), **_computed(ledger), **facts}


def _computed(ledger: Ledger) -> dict[str, Callable[[], float]]:
    """Return the checks that compute with numbers of the ledger; they read a number only when they are run."""
    claimed, fact = ledger.claimed, ledger.fact

    def batch_size() -> float:
        return fact("official/images-per-gpu") * fact("official/gpus")

    def learning_rate() -> float:  # main_tokenbridge.py: blr * eff_batch_size / 256
        return fact("official/base-learning-rate") * batch_size() / fact("official/base-batch-size")

    def classes(per_group: int) -> float:
        return fact("table2d/levels") ** per_group

    def grouped_head(per_group: int, depth: int) -> float:
        return count_grouped_head(per_group, depth=depth, num_levels=int(fact("table2d/levels")))

    return {
        "speed-up": lambda: claimed("table5/mar/ms") / claimed("table5/tokenbridge/ms"),
        "rfid-of-16-levels": lambda: claimed("table1a/ptq-16/rfid") - claimed("table1a/vae/rfid"),
        "batch-size": batch_size,
        "learning-rate": learning_rate,
        **{f"classes/{n}": partial(classes, n) for n in CHANNELS_PER_GROUP},
        **{
            f"grouped-head/{n}/depth-{depth}": partial(grouped_head, n, depth)
            for n in CHANNELS_PER_GROUP
            for depth in (3, 4)
        },
    }


def _counted() -> dict[str, Callable[[], float]]:
    """Return the checks of our modules and presets: parameters, sizes, settings, distortions."""
    published = ("tokenbridge-l", "tokenbridge-h")
    return {
        **{f"parameters/{name}": partial(_size, name) for name in all_presets()},
        **{
            f"parameters/{name}-head": partial(_size, name, "head")
            for name in ("tokenbridge-b", "tokenbridge-l", "tokenbridge-h", "mar-b", "mar-l", "mar-h")
        },
        **{
            f"parameters/{name}-{part}": partial(_size_of_part, create, part)
            for name, create in (("kl16", create_kl16), ("givt-vae", create_givt_vae))
            for part in ("encoder", "decoder")
        },
        "parameters/llamagen-xxxl": _size_of_xxxl,
        "parameters/kl16": lambda: count(create_kl16()),
        "parameters/llamagen-vq16": lambda: count(create_vq("llamagen-vq16")),
        "parameters/givt-vae": lambda: count(create_givt_vae()),
        "parameters/tokenbridge-b-backbone": count_backbone,
        **{
            f"head/{width}x{depth}/{rule}": partial(count_head, width, depth, rule)
            for width, depth in HEADS
            for rule in COUNTING_RULES
        },
        "fewer-than-mar-h": lambda: float(_size("tokenbridge-h") < _size("mar-h")),
        **{f"width/{name}": partial(_width, name) for name in published},
        **{f"blocks/{name}": partial(_blocks, name) for name in published},
        **{
            f"sampling/{name}/{key}": partial(_setting, name, key)  # as in the README's command
            for name in published
            for key in ("temperature", "guidance_scale")
        },
        **{f"distortion/{levels}-levels": partial(distortion, levels, 5.0) for levels in (8, 16, 32, 64)},
        "distortion/order-of-ranges": lambda: float(_range_order()),
    }


def _size(name: str, part: str | None = None) -> float:
    system, preset = all_presets()[name]
    model = build_preset(system.model, preset)
    return count(model if part is None else model.get_submodule(part))


def _size_of_part(create: Callable[[], nn.Module], part: str) -> float:
    with torch.device("meta"):
        return count(create().get_submodule(part))


def _size_of_xxxl() -> float:
    """Return the number of parameters of LlamaGen's GPT-XXXL, whose weights were not published."""
    with torch.device("meta"):
        return count(LlamaGen(**SIZES["GPT-XXXL"]))


def _width(name: str) -> float:
    return float(create_model(name).backbone.z_proj.out_features)


def _blocks(name: str) -> float:
    backbone = create_model(name).backbone
    return float(len(backbone.encoder_blocks) + len(backbone.decoder_blocks))


def _setting(name: str, key: str) -> float:
    return float(getattr(PRESETS[name].sampling_config(), key))


def _range_order() -> bool:
    errors = [distortion(64, float(value_range)) for value_range in (2, 3, 4, 5)]
    return errors == sorted(errors, reverse=True)
