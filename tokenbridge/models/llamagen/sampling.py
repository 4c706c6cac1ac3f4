"""Sampling LlamaGen: one token after another, with guidance, top-k and top-p.

Shape letters: B batch, L positions, N rows of logits, V codes of the tokenizer.
"""

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
    """The sampling settings, which together with the seed and the label determine an image.

    They are applied in this order: guidance, temperature, top-k, top-p.
    """

    # Guided logits are unconditional + scale (conditional - unconditional); a scale of at most 1 turns guidance off.
    guidance_scale: float = 1.0
    num_guided: int | None = None  # the first so many tokens are guided (official cfg_interval + 2); None guides all
    temperature: float = 1.0  # divides the logits; at 0 the most likely token is chosen
    top_k: int = 0  # keeps the k most likely tokens, and those tied with the last of them; 0 keeps all
    top_p: float = 1.0  # keeps the most likely tokens until their probabilities sum to more than this; 1 keeps all

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
    """Set the logits [N, V] of unlikely tokens to -inf, first by top-k and then by top-p of the remaining tokens.

    Quirks kept (generate.py, `top_k_top_p_filtering`): all tokens tied with the k-th are kept. top-p removes a token if
    the probabilities of those BEFORE it already sum to more than `top_p`, so it keeps the token that passes the
    threshold, and at least one token.
    """
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        ordered, tokens = logits.sort(descending=True)
        past = ordered.softmax(-1).cumsum(-1) > top_p
        removed = F.pad(past[:, :-1], (1, 0))  # the sum before a token decides; the most likely one is never removed
        logits = logits.masked_fill(removed.scatter(1, tokens, removed), -math.inf)
    return logits


@torch.inference_mode()
def generate_tokens(model: LlamaGen, labels: Tensor, config: LlamaGenSampling, uniforms: Tensor | None) -> Tensor:
    """Generate the tokens of a batch of images; conditional and unconditional halves run as one batch.

    Args:
        model: the model in evaluation mode.
        labels: [B].
        uniforms: [B, L] in [0, 1), one number for every token. `image_noise(seed, indices, L, 1).uniforms[..., 0]`
            gives numbers with which an image does not depend on its batch. If None, the function draws what the
            official code draws, from torch's global stream.

    Returns:
        Tokens [B, L] int64 in raster order; they are -1 where the logits were NaN.

    Raises:
        UserError: a label is out of range, or there is not one label for each row of `uniforms`.
    """
    check_labels(labels, len(labels) if uniforms is None else len(uniforms), model.num_classes)
    keep = partial(filter_logits, top_k=config.top_k, top_p=config.top_p)
    choose = token_chooser(config.temperature, None if uniforms is None else uniforms.to(model.device), keep)
    bad: list[Tensor] = []

    def choose_and_note(logits: Tensor, place: int) -> Tensor:
        bad.append(logits.isnan().any(-1))  # NaN logits would give a valid token, so it is replaced by -1 at the end
        return choose(logits, place)

    tokens = model.sample(
        labels.to(model.device), choose_and_note, guidance_scale=config.guidance_scale, num_guided=config.num_guided
    )
    return tokens.masked_fill(torch.stack(bad, dim=1), -1)


def generate(model: LlamaGen, labels: Tensor, settings: LlamaGenSampling, noise: Noise) -> Tensor:
    """Draw the random numbers of a batch of images as `noise` says, and return its tokens (see `generate_tokens`)."""
    uniforms = None
    if isinstance(noise, PerImage):
        uniforms = image_noise(noise.seed, noise.indices, model.num_positions, 1).uniforms[..., 0]
    return generate_tokens(model, labels, settings, uniforms)
