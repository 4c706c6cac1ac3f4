"""Discrepancies in quantisation: the edges of the bins, the Gaussian, the posterior."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenbridge.data.arrays import open_archive
from tokenbridge.models.tokenbridge.checkpoint import official_buffers
from tokenbridge.reproduction.discrepancies.study import Arm, Scores, Study, not_run_row, row_of, rows_of, share
from tokenbridge.results.schema import Row
from tokenbridge.results.score import ScoreName
from tokenbridge.tokenizers.quantizer import ScalarQuantizer, gaussian_quantizer
from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from tokenbridge.models.tokenbridge.model import TokenBridge


NUM_VALUES = 1_000_000  # values of N(0, 1) that test the quantiser alone
MAX_LATENTS = 2**32  # bytes


def encode(study: Study) -> list[Row]:
    """Compare the nearest codebook value, which the code takes, with the bin of equation 3, which it never uses.

    The buffer `boundaries` holds the edges of the bins, which do not lie halfway between two conditional means. The
    two are compared on test images, on N(0, 1), and, without decoding, on latents from a file.
    """
    latents = study.scaled(study.posterior.mode())
    normal = torch.randn(NUM_VALUES, generator=torch.Generator().manual_seed(study.seed)).to(latents.device)
    given = None if study.latents is None else read_latents(study.latents).to(latents.device)
    quantizer, edges = study.model.quantizer, bin_edges(study.model)
    arms: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "nearest": ("nearest value (official code)", quantizer.encode),
        "boundary": ("bin between boundaries (paper)", lambda x: torch.bucketize(x, edges)),
    }
    rows, rows_of_given = [], []
    for name, (label, to_tokens) in arms.items():
        metrics = _against_nearest(quantizer, to_tokens, latents)
        of_normal = _against_nearest(quantizer, to_tokens, normal)
        metrics |= {str(ScoreName(metric, remark="N(0, 1)")): value for metric, value in of_normal.items()}
        rows.append(row_of(f"encode-{name}", label, metrics | study.reconstruct(quantizer.lookup(to_tokens(latents)))))
        name, label = f"encode-{name}-given", f"{label}, given latents"
        if given is None:
            rows_of_given.append(not_run_row(name, label, "no latents were given (--latents FILE)"))
        else:
            rows_of_given.append(row_of(name, label, _against_nearest(quantizer, to_tokens, given)))
    return rows + rows_of_given


def bin_edges(model: TokenBridge) -> Tensor:
    """Return the inner edges [V - 1] of the bins, in latent units: the official buffer `boundaries`."""
    config: Any = model.config
    edges = official_buffers(model)["boundaries"] * (config.value_range / config.num_sigmas)
    return edges[1:-1].to(model.device)


def read_latents(path: Path) -> Tensor:
    """Read the array `latents` of an .npz file, divided by its standard deviation, as float32.

    Raises:
        UserError: the file holds no such array, or the latents are not finite or all equal.
    """
    with open_archive(path, "an .npz file with an array `latents` of numbers") as archive:
        latents = torch.from_numpy(archive.read("latents", MAX_LATENTS)).float()
    deviation = latents.double().std(correction=0).item()
    if not 0 < deviation < float("inf"):
        raise UserError(f"The latents in {path} have the standard deviation {deviation}.")
    return latents / deviation


def _against_nearest(quantizer: ScalarQuantizer, to_tokens: Callable[[Tensor], Tensor], latents: Tensor) -> Scores:
    tokens = to_tokens(latents)
    error = (quantizer.lookup(tokens).double() - latents.double()).square().mean()
    return {
        "tokens that differ": share(tokens != quantizer.encode(latents)),
        "relative MSE": (error / latents.double().var(correction=0)).item(),
    }


def gaussian_fit(study: Study) -> list[Row]:
    """Compare bins for a deviation of 5/3, to which mapping ±5 to ±3 amounts, with bins for 1, the latents' own."""
    config: Any = study.model.config
    latents = study.scaled(study.posterior.mode())
    arms = {
        "official": (config.value_range, f"fitted to a deviation of {config.value_range / config.num_sigmas:.3f}"),
        "unit": (config.num_sigmas, "fitted to a deviation of 1, the latents' own"),
    }
    rows = []
    for name, (value_range, label) in arms.items():
        quantizer = gaussian_quantizer(config.num_levels, value_range=value_range, num_sigmas=config.num_sigmas)
        quantizer.to(latents.device)
        error = {"relative MSE": _against_nearest(quantizer, quantizer.encode, latents)["relative MSE"]}
        rows.append(row_of(f"gaussian-fit-{name}", label, error | study.reconstruct(quantizer(latents))))
    return rows


def posterior(study: Study) -> list[Row]:
    """Compare a sample of the autoencoder's posterior, which the official code takes, with its mean (64 levels)."""
    quantizer = study.model.quantizer

    def draw(seed: int) -> Tensor:
        generator = torch.Generator(study.bench.device).manual_seed(seed)
        return study.scaled(study.posterior.sample(generator=generator))

    mean = study.scaled(study.posterior.mode())
    samples = [study.reconstruct(quantizer(draw(seed))) for seed in study.seeds]
    differ = share(quantizer.encode(draw(study.seed)) != quantizer.encode(mean))
    return rows_of(
        "posterior",
        Arm("sample", "a sample (official code)", samples, {"tokens that differ": differ}),
        Arm("mean", "the mean", [study.reconstruct(quantizer(mean))], {"tokens that differ": 0.0}),
    )
