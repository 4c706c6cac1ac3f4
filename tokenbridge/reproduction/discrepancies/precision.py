"""Discrepancies of half precision, in generation and in quantisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenbridge.data.images import images_to_pixels, pixels_to_images
from tokenbridge.reproduction.discrepancies.study import Arm, Study, row_of, rows_of, share
from tokenbridge.results.schema import Row
from tokenbridge.results.score import ScoreName
from tokenbridge.tokenizers.quantizer import ScalarQuantizer

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def tokens_precision(study: Study) -> list[Row]:
    """Compare generation under autocast, VAE included, with float32: the paper says bfloat16, the code takes float16.

    There is one seed with half the images, because half precision is slow on a CPU.
    """
    labels = study.labels[: study.num_images // 2]

    arms = {
        "fp32": ("float32", None),
        "fp16": ("float16 autocast (official code)", HALVES["fp16"]),
        "bf16": ("bfloat16 autocast (paper)", HALVES["bf16"]),
    }
    tokens, scores = {}, {}
    for name, (_, dtype) in arms.items():
        with _autocast(study, dtype):
            tokens[name] = study.generate(study.config, labels, study.seed)
            pixels = images_to_pixels(study.images(tokens[name]))
        scores[name] = [study.score(pixels, labels)]
    differ = {name: t != tokens["fp32"] for name, t in tokens.items()}
    also = {
        name: {
            "generated tokens that differ": share(different),
            "images that differ": share(different.flatten(1).any(1)),
        }
        for name, different in differ.items()
    }
    return rows_of("tokens", *(Arm(name, label, scores[name], also[name]) for name, (label, _) in arms.items()))


def _autocast(study: Study, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(study.bench.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def latents_precision(study: Study) -> list[Row]:
    """Count the tokens of test images that change when a part before or in the quantiser is in half precision.

    The parts are the encoder, which runs under autocast, the latents, the mapping of the latents to ±3, which the
    official `quantize` computes in the precision of its input, and the codebook.
    """
    latents = study.scaled(study.posterior.mode())
    quantizer = study.model.quantizer
    tokens = quantizer.encode(latents)
    images = pixels_to_images(study.bench.test_pixels).to(study.bench.device)
    config: Any = study.model.config

    def mapped(x: Tensor) -> Tensor:
        low, span, sigmas = -config.value_range, 2 * config.value_range, config.num_sigmas
        unit = (x - low) / span * (2 * sigmas) - sigmas
        return unit.clamp(-sigmas, sigmas).float() * (config.value_range / sigmas)

    rows = []
    for name, dtype in HALVES.items():
        with torch.inference_mode(), _autocast(study, dtype):
            encoded = study.scaled(study.bench.latents.autoencoder.encode(images).latent_dist.mode())
        coarse = quantizer.codebook.to(dtype).float()
        flips = {
            "encoder": quantizer.encode(encoded),
            "latents": quantizer.encode(latents.to(dtype)),
            "latents, mapped": quantizer.encode(mapped(latents.to(dtype))),
            "codebook": ScalarQuantizer(coarse).to(latents.device).encode(latents),
        }
        metrics = {str(ScoreName("tokens that differ", remark=what)): share(t != tokens) for what, t in flips.items()}
        rows.append(row_of(f"latents-{name}", f"{dtype}".removeprefix("torch."), metrics))
    return rows
