"""Sampling LlamaGen: one code after another, with top-k and top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenbridge.models.draw import check_labels, token_chooser
from tokenbridge.models.llamagen.model import LlamaGen
from tokenbridge.models.noise import Noise, PerImage, image_noise
from tokenbridge.utils.errors import UserError


@dataclass(frozen=True)
class LlamaGenSampling:
    """Everything that decides which tokens a seed gives. In this order: guidance, temperature, top-k, top-p."""

    guidance_scale: float = 1.0  # logits: unconditional + scale (conditional - unconditional); at most 1 means none
    num_guided: int | None = None  # tokens guided, from the first on; None guides all. Official cfg_interval + 2
    temperature: float = 1.0  # divides the logits; 0 takes the most likely token
    top_k: int = 0  # keep the k most likely tokens, and those tied with the last of them; 0 keeps all
    top_p: float = 1.0  # keep the most likely tokens until their sum passes this; 1 keeps all

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "temperature"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise UserError(f"{name} must be at least 0, not {value}.")
        if self.num_guided is not None and self.num_guided < 0:
            raise UserError(f"num_guided must be at least 0, not {self.num_guided}.")
        if self.top_k < 0:
            raise UserError(f"top_k must be at least 0, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], not {self.top_p}.")


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set the logits [N, V] of unlikely tokens to -inf: top-k, then top-p of what is left.

    Quirks kept (generate.py, `top_k_top_p_filtering`): tokens tied with the k-th all stay; top-p removes a token if
    those BEFORE it already sum to more than `top_p`, so the one that passes the threshold stays, and at least one.
    """
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        ordered, tokens = logits.sort(descending=True)
        past = ordered.softmax(-1).cumsum(-1) > top_p
        removed = F.pad(past[:, :-1], (1, 0))  # by the sum before it; the most likely is never removed
        logits = logits.masked_fill(removed.scatter(1, tokens, removed), -math.inf)
    return logits


@torch.inference_mode()
def generate_tokens(model: LlamaGen, labels: Tensor, config: LlamaGenSampling, uniforms: Tensor | None) -> Tensor:
    """Generate the tokens of a batch of images; conditional and unconditional halves run as one batch.

    Args:
        model: in evaluation mode.
        labels: [B] class labels.
        config: how to sample.
        uniforms: [B, L] in [0, 1), one for every token: `image_noise(seed, indices, L, 1).uniforms[..., 0]`, so
            that an image does not depend on the batch it was made in. None draws from torch's global stream what
            the official code draws.

    Returns:
        tokens [B, L] int64, raster order; -1 where the logits were NaN.

    Raises:
        ValueError: labels out of range, or not one for each row of uniforms.
    """
    check_labels(labels, len(labels) if uniforms is None else len(uniforms), model.num_classes)
    keep = partial(filter_logits, top_k=config.top_k, top_p=config.top_p)
    choose = token_chooser(config.temperature, None if uniforms is None else uniforms.to(model.device), keep)
    bad: list[Tensor] = []

    def choose_and_note(logits: Tensor, place: int) -> Tensor:
        bad.append(logits.isnan().any(-1))  # whatever is chosen by them is a valid token: one look at the end finds it
        return choose(logits, place)

    tokens = model.sample(
        labels.to(model.device), choose_and_note, guidance_scale=config.guidance_scale, num_guided=config.num_guided
    )
    return tokens.masked_fill(torch.stack(bad, dim=1), -1)


def generate(model: LlamaGen, labels: Tensor, settings: LlamaGenSampling, noise: Noise) -> Tensor:
    """Generate tokens [B, L] of a batch of images from `noise`; otherwise as `generate_tokens`."""
    uniforms = None
    if isinstance(noise, PerImage):
        uniforms = image_noise(noise.seed, noise.indices, model.num_positions, 1).uniforms[..., 0]
    return generate_tokens(model, labels, settings, uniforms)
