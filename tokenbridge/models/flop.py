"""Operations of one image, counted from the sizes of a model; what a plan and a cost table need.

A multiply-add of a matrix product or convolution is two, and nothing else counts: no softmax, no normalisation, and
not the elementwise work of diffusion steps or of GIVT's rejection sampling. `tests/test_flop.py` holds every count
against torch's own.

Shape letters: L positions, C channels, V levels or codes, D width, W width of a head, S elements of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import VQModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenbridge.models.givt.sampling import GivtSampling
from tokenbridge.models.llamagen.model import hidden_width
from tokenbridge.models.llamagen.sampling import LlamaGenSampling
from tokenbridge.models.mar.diffusion import spaced_timesteps
from tokenbridge.models.mar.model import NUM_FREQUENCIES
from tokenbridge.models.mar.sampling import MarSampling
from tokenbridge.models.masked_sampling import MaskedSampling, masked_counts
from tokenbridge.models.tokenbridge.heads import HeadConfig
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling
from tokenbridge.tokenizers.llamagen_vq import LlamaGenVQ

FLOP = dict[str, float]


def tokenbridge_flop(
    model: Mapping[str, Any],
    sampling: TokenBridgeSampling,
    vae: nn.Module,
    *,
    official_backbone: bool = False,
    official_head: bool = False,
) -> FLOP:
    """Count the operations of one image, by part.

    Args:
        model: keyword arguments of `TokenBridge`, with all the sizes of a preset.
        sampling: guidance other than 1 doubles encoder and decoder; the head runs once all the same.
        vae: on the meta device.
        official_backbone: count what the official code runs; see `backbone_flop`.
        official_head: likewise; see `head_flop`.
    """
    backbone, num_predicted = _all_iterations(model, sampling, official=official_backbone)
    head = head_flop(model, official=official_head)
    return {**backbone, "head": num_predicted * head, "VAE decoder": decoder_flop(vae, model["latent_size"])}


def mar_flop(model: Mapping[str, Any], sampling: MarSampling, vae: nn.Module) -> FLOP:
    """Count the operations of one image of MAR, by part; arguments as for `tokenbridge_flop`.

    Under guidance the diffusion head runs for both halves, once for every diffusion step. The timesteps are embedded
    once a pass for all positions (the official code embeds them for every position).
    """
    backbone, num_predicted = _all_iterations(model, sampling)
    width, channels = model["head_width"], model["num_channels"] * model.get("patch_size", 1) ** 2
    num_steps = len(spaced_timesteps(sampling.num_diffusion_steps))
    step = 2 * width * (channels + 5 * width * model["head_depth"] + 2 * width + 2 * channels)
    condition = 2 * (model.get("decoder_width") or model["width"]) * width
    times = 2 * num_steps * width * (2 * NUM_FREQUENCIES + width)
    halves = 1 if sampling.guidance_scale == 1 else 2
    head = halves * num_predicted * (condition + num_steps * step) + sampling.num_iterations * times
    return {**backbone, "head": head, "VAE decoder": decoder_flop(vae, model["latent_size"])}


def llamagen_flop(model: Mapping[str, Any], sampling: LlamaGenSampling, vq: nn.Module) -> FLOP:
    """Count the operations of one image of LlamaGen, by part.

    Args:
        model: keyword arguments of `LlamaGen`, with all the sizes of a preset.
        sampling: guidance above 1 doubles the transformer, for the tokens that it is mixed into.
        vq: the tokenizer, on the meta device.
    """
    width, length = model["width"], model["latent_size"] ** 2
    hidden = hidden_width(width, model.get("hidden_factor"), model.get("hidden_multiple", 256))
    keys_values = 2 * (model.get("num_kv_heads") or model["num_heads"]) * (width // model["num_heads"])
    products = 2 * width * (2 * width + keys_values + 3 * hidden)
    no_guidance = sampling.guidance_scale <= 1
    num_guided = 0 if no_guidance else length if sampling.num_guided is None else sampling.num_guided
    transformer = 0.0
    for place in range(length):
        one = model["depth"] * (products + 4 * (place + 1) * width) + 2 * width * model["num_codes"]
        transformer += 2 * one if place < num_guided else one
    return {"transformer": transformer, "VQ decoder": decoder_flop(vq, model["latent_size"])}


def givt_flop(model: Mapping[str, Any], sampling: GivtSampling, vae: nn.Module) -> FLOP:
    """Count the operations of one image of GIVT, by part.

    Args:
        model: keyword arguments of `GIVT`, with all the sizes of a preset.
        sampling: guidance doubles the transformer.
        vae: on the meta device.
    """
    width, channels, length = model["width"], model["num_channels"], model["num_positions"]
    outputs = model["num_components"] * (1 + 2 * channels)
    products = 2 * width * (4 * width + 2 * model["mlp_width"])
    transformer = sum(model["depth"] * (products + 4 * (n + 1) * width) + 2 * width * outputs for n in range(length))
    halves = 2 if sampling.guidance_weight > 0 else 1
    project = 2 * channels * width * length  # that of the last position too, which nothing follows
    decoder = decoder_flop(vae, math.isqrt(length))
    return {"transformer": halves * transformer + project, "VAE decoder": decoder}


def decoder_flop(decoder: Any, latent_size: int) -> float:
    """Return torch's count for decoding one image by an autoencoder on the meta device, where nothing is computed."""
    config = decoder.config
    channels = config.get("code_channels") or config.get("vq_embed_dim") or config["latent_channels"]
    latents = torch.empty(1, channels, latent_size, latent_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if isinstance(decoder, LlamaGenVQ):
            decoder.raw_images(latents)
        else:  # of diffusers, or with its interface
            decoder.decode(latents, **({"force_not_quantize": True} if isinstance(decoder, VQModel) else {}))
    return float(counter.get_total_flops())


def backbone_flop(
    model: Mapping[str, Any], num_masked: int, num_asked: int, *, guided: bool, official: bool = False
) -> FLOP:
    """Count encoder and decoder of one iteration of masked sampling, for one image.

    Args:
        model: keyword arguments of `TokenBridge` or `MAR`.
        num_masked: positions that are masked before the iteration.
        num_asked: positions whose context vectors are asked for.
        guided: with a second pass, without class.
        official: the official code embeds masked positions too, and runs the last decoder block for all positions.
    """
    patch_size, ratio = model.get("patch_size", 1), model.get("mlp_ratio", HeadConfig.mlp_ratio)
    length, channels = (model["latent_size"] // patch_size) ** 2, model["num_channels"] * patch_size**2
    buffer, width = model["num_buffer"], model["width"]
    decoder_width = model.get("decoder_width") or width
    seen, full = buffer + length - num_masked, buffer + length
    encoder = 2 * channels * width * (length if official else length - num_masked)
    encoder += model["encoder_depth"] * _block(width, ratio, seen, seen)
    decoder = 2 * width * decoder_width * seen
    decoder += (model["decoder_depth"] - 1) * _block(decoder_width, ratio, full, full)
    decoder += _block(decoder_width, ratio, full, full if official else num_asked)
    halves = 2 if guided else 1
    return {"encoder": halves * encoder, "decoder": halves * decoder}


def head_flop(model: Mapping[str, Any], *, official: bool = False) -> float:
    """Count TokenBridge's head for one position.

    Args:
        model: keyword arguments of `TokenBridge`.
        official: the official autoregressive head runs the whole prefix again for every channel.
    """
    channels, width, depth = model["num_channels"], model["head_width"], model["head_depth"]
    ratio = model.get("mlp_ratio", HeadConfig.mlp_ratio)
    conditions = 2 * width * (6 * depth + 2) * width  # modulation of all blocks and of the final layer, one channel
    logits = 2 * width * model["num_levels"] * channels
    project = 2 * (model.get("decoder_width") or model["width"]) * width
    if model.get("head_type", "ar") == "parallel":
        return project + channels * conditions + depth * _block(width, ratio, channels, channels) + logits
    if official:
        prefixes = range(1, channels + 1)
        blocks = sum(_block(width, ratio, n, n) for n in prefixes)
        return project + sum(prefixes) * conditions + depth * blocks + logits
    elements = sum(_block(width, ratio, 1, 1) + 4 * i * width for i in range(channels))
    return project + channels * conditions + depth * elements + logits


def _all_iterations(model: Mapping[str, Any], sampling: MaskedSampling, *, official: bool = False) -> tuple[FLOP, int]:
    """Count encoder and decoder of an image, and the positions that are predicted on the way."""
    tries_all = isinstance(sampling, TokenBridgeSampling) and sampling.position_order == "confidence"
    num_masked = (model["latent_size"] // model.get("patch_size", 1)) ** 2
    total, num_predicted = {"encoder": 0.0, "decoder": 0.0}, 0
    for still_masked in masked_counts(num_masked, sampling.num_iterations):
        num_asked = num_masked if tries_all else num_masked - still_masked
        one = backbone_flop(model, num_masked, num_asked, guided=sampling.guidance_scale != 1, official=official)
        total = {part: total[part] + one[part] for part in total}
        num_predicted += num_asked
        num_masked = still_masked
    return total, num_predicted


def _block(width: int, mlp_ratio: float, seen: int, asked: int) -> float:
    """Count a transformer block: `asked` elements attend to `seen`."""
    keys_values = 4 * width**2 * seen
    query_output = 4 * width**2 * asked
    mlp = 4 * width * int(width * mlp_ratio) * asked
    return keys_values + query_output + mlp + 4 * asked * seen * width
