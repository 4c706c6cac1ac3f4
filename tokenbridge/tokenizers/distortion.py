"""The distortion that a quantiser causes on given latents."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenbridge.tokenizers.quantizer import ScalarQuantizer, lloyd_max_quantizer
from tokenbridge.utils.errors import UserError


@dataclass(frozen=True)
class Distortion:
    """The distortion that a quantiser causes on given latents; errors are in squared latent units."""

    num_levels: int
    mse: float  # mean squared error
    variance: float  # variance of the latents
    relative_mse: float  # mse / variance
    snr_db: float  # 10 log10(variance / mse)
    entropy_bits: float  # empirical entropy of the tokens, bits per dimension
    bits_per_dimension: float  # log2 V, the storage of a token
    lloyd_max_relative_mse: float  # of the best V levels for these latents
    rate_distortion_relative_mse: float  # 2^(-2 log2 V), the least at this rate on Gaussian latents


def measure_distortion(quantizer: ScalarQuantizer, latents: Tensor) -> Distortion:
    """Measure the distortion of `latents`, beside the Lloyd-Max optimum and the rate-distortion bound.

    The Lloyd-Max codebook is fitted to these same latents.

    Raises:
        UserError: all latents are equal.
    """
    latents = latents.detach().to("cpu", torch.float32)
    quantizer = copy.deepcopy(quantizer).to("cpu")  # a copy, since the caller's must stay on its device
    tokens = quantizer.encode(latents)
    variance = latents.double().var(correction=0).item()
    if variance == 0:
        raise UserError("The latents are all equal; distortion is undefined.")
    mse = _mse(quantizer.lookup(tokens), latents)
    best = lloyd_max_quantizer(latents, quantizer.num_levels)
    frequencies = torch.bincount(tokens.flatten(), minlength=quantizer.num_levels).double() / tokens.numel()
    return Distortion(
        num_levels=quantizer.num_levels,
        mse=mse,
        variance=variance,
        relative_mse=mse / variance,
        snr_db=10 * math.log10(variance / mse) if mse > 0 else math.inf,
        entropy_bits=torch.special.entr(frequencies).sum().item() / math.log(2),
        bits_per_dimension=math.log2(quantizer.num_levels),
        lloyd_max_relative_mse=_mse(best(latents), latents) / variance,
        rate_distortion_relative_mse=quantizer.num_levels**-2.0,
    )


def _mse(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).square().mean().item()
