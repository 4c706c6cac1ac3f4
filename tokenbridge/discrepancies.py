"""What each discrepancy does: the paper against its code, and the code against itself, measured at one scale.

Each comparison is a function that returns a row for each side, both measured in the same run with the same seeds:
image i of a seed has the same random numbers on all sides. Rows are called `discrepancies/<comparison>-<side>`.
Where a score is of samples, it is the mean over several seeds; `±` is the standard deviation over the seeds, and
`change of` the difference from the comparison's first row, seed by seed.

Shape letters: N images or values, L positions, C channels, V levels, W head width.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from tokenbridge import givt, llamagen, provenance, sampling
from tokenbridge.data import images_to_pixels, load_images, pixels_to_images
from tokenbridge.files import sha256_of, write_text
from tokenbridge.heads import ARHead
from tokenbridge.metrics import Statistics, extract_features, fidelity_distance, inception_score, statistics_of
from tokenbridge.official import official_buffers
from tokenbridge.quantizer import ScalarQuantizer, gaussian_quantizer
from tokenbridge.reconstruction import reconstruction_metrics
from tokenbridge.reproduce import MAIN_SYSTEM, Bench, Say, open_bench
from tokenbridge.results import (
    TREND_COLUMNS,
    Provenance,
    Results,
    Row,
    Trend,
    cell,
    columns_of,
    markdown_table,
    trend_cells,
    write,
)
from tokenbridge.sampling import SamplingConfig, image_batches, image_noise
from tokenbridge.weights import WEIGHTS_FILE

if TYPE_CHECKING:
    from tokenbridge.generator import TokenBridge
    from tokenbridge.heads import Pick
    from tokenbridge.recipes import Scale
    from tokenbridge.transformer import ModulatedBlock

NUM_SEEDS = 3
BATCH_SIZE = 250
NUM_VALUES = 1_000_000  # of N(0, 1), for the quantiser alone
NUM_GIVT_IMAGES = 100  # their tokens are enough, and 1,000 proposals for each take memory
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
Scores = dict[str, float]


@dataclass(frozen=True)
class Study:
    """What the comparisons share: models, images, seeds, and the samples that several of them start from."""

    bench: Bench
    num_images: int  # samples of each seed
    seed: int  # the first of NUM_SEEDS
    latents: Path | None = None  # real latents to quantise, see `read_latents`

    @property
    def seeds(self) -> range:
        """The seeds of samples."""
        return range(self.seed, self.seed + NUM_SEEDS)

    @property
    def labels(self) -> Tensor:
        """Balanced labels [N], class after class in turn, as the official evaluation has them."""
        return torch.arange(self.num_images) % len(self.bench.scale.classes)

    @property
    def config(self) -> SamplingConfig:
        """The tiny TokenBridge's own sampling settings."""
        config = self.bench.scale.recipe(MAIN_SYSTEM).sampling
        assert isinstance(config, SamplingConfig)
        return config

    @functools.cached_property
    def model(self) -> TokenBridge:
        """TokenBridge with 64 levels."""
        model: TokenBridge = self.bench.model(MAIN_SYSTEM)
        return model

    @functools.cached_property
    def reference(self) -> Statistics:
        """Features of the training images."""
        return statistics_of(extract_features(self.bench.train_pixels, self.bench.classifier)[0])

    @functools.cached_property
    def base_images(self) -> list[Tensor]:
        """Samples of each seed by the recipe's settings, float [N, C, H, W] in [-1, 1]."""
        return [self.images(self.generate(self.config, self.labels, seed)) for seed in self.seeds]

    @functools.cached_property
    def posterior(self) -> Any:
        """The autoencoder's posterior of the test images."""
        images = pixels_to_images(self.bench.test_pixels).to(self.bench.device)
        with torch.inference_mode():
            return self.bench.latents.autoencoder.encode(images).latent_dist

    def scaled(self, raw: Tensor) -> Tensor:
        """Return the autoencoder's latents at the scale of the generators."""
        return (raw.float() - self.bench.latents.shift) * self.bench.latents.scale

    def generate(
        self, config: SamplingConfig, labels: Tensor, seed: int, *, model: TokenBridge | None = None
    ) -> Tensor:
        """Return tokens [N, L, C] of one image for each label.

        Raises:
            FloatingPointError: the model's numbers overflow.
        """
        model = model or self.model
        batches = image_batches(len(labels), BATCH_SIZE, show_progress=False)
        noise = ((i, image_noise(seed, i, model.num_positions, model.num_channels)) for i in batches)
        tokens = torch.cat([sampling.generate_tokens(model, labels[i], config, numbers) for i, numbers in noise])
        if int(tokens.min()) < 0:
            raise FloatingPointError("The logits of the generator are NaN.")
        return tokens

    def images(self, tokens: Tensor) -> Tensor:
        """Return images [N, C, H, W] in [-1, 1], on the CPU, of tokens [N, L, C]."""
        return self.decode(self.model.to_latents(tokens))

    def decode(self, latents: Tensor) -> Tensor:
        """Return images [N, C, H, W] in [-1, 1], on the CPU, of scaled latents."""
        return torch.cat([self.bench.latents.images(part).cpu() for part in latents.split(BATCH_SIZE)])

    def score(self, pixels: Tensor, labels: Tensor) -> Scores:
        """Return Fréchet distance to the training images, Inception Score and class accuracy of uint8 pixels."""
        features, logits = extract_features(pixels, self.bench.classifier)
        return {
            f"FID-{self.bench.extractor}": fidelity_distance(statistics_of(features), self.reference),
            f"IS-{self.bench.extractor}": inception_score(logits, 0)[0],
            "class accuracy": (logits.argmax(1) == labels).double().mean().item(),
        }

    def score_samples(self, config: SamplingConfig, *, model: TokenBridge | None = None) -> list[Scores]:
        """Sample by `config` and score, for each seed."""
        tokens = [self.generate(config, self.labels, seed, model=model) for seed in self.seeds]
        return [self.score(images_to_pixels(self.images(t)), self.labels) for t in tokens]

    @functools.cached_property
    def base_scores(self) -> list[Scores]:
        """Scores of the recipe's own samples, for each seed."""
        return [self.score(images_to_pixels(images), self.labels) for images in self.base_images]

    def reconstruct(self, latents: Tensor) -> Scores:
        """Return PSNR, SSIM, rFID and IS of the test images, decoded from (quantised) latents."""
        pixels = images_to_pixels(self.decode(latents))
        return reconstruction_metrics(
            self.bench.test_pixels, pixels, classifier=self.bench.classifier, extractor=self.bench.extractor
        )


@dataclass(frozen=True)
class Side:
    """One side of a comparison."""

    name: str
    label: str
    scores: Sequence[Scores]  # one for each seed
    also: Scores = dataclasses.field(default_factory=dict)  # measured once


def rows_of(comparison: str, *sides: Side) -> list[Row]:
    """Return a row for each side: means over seeds, their deviation, and the change from the first side."""
    rows = []
    for side in sides:
        metrics: Scores = {}
        for name in side.scores[0]:
            values = [scores[name] for scores in side.scores]
            metrics |= {name: statistics.fmean(values), **_deviation(name, values)}
            if side is not sides[0] and len(sides[0].scores) == len(values) and name.startswith("FID"):
                changes = [value - scores[name] for value, scores in zip(values, sides[0].scores, strict=True)]
                name = f"change of {name}"
                metrics |= {name: statistics.fmean(changes), **_deviation(name, changes)}
        rows.append(_row(f"{comparison}-{side.name}", side.label, {**metrics, **side.also}))
    return rows


def _row(name: str, label: str, metrics: Scores) -> Row:
    return Row(id=f"discrepancies/{name}", label=label, metrics={k: round(v, 8) for k, v in metrics.items()})


def _deviation(name: str, values: Sequence[float]) -> Scores:
    return {f"± {name}": statistics.stdev(values)} if len(values) > 1 else {}


# ------------------------------------------------------------------------------------------------- the head


def first_element(study: Study) -> list[Row]:
    """Compare what the head's sequence starts with: sampling adds timestep embedding 0, training does not.

    Source: models/tokenbridge.py, `_sample_channel_ar` against `forward_channel_ar`.
    """
    official = study.score_samples(replace(study.config, first_element="official"))
    consistent = study.score_samples(replace(study.config, first_element="training-consistent"))
    return rows_of(
        "first-element",
        Side("official", "condition + timestep embedding 0 (official sampling)", official),
        Side("training", "condition alone (as in training)", consistent),
    )


def final_layer(study: Study) -> list[Row]:
    """Compare the order of the final layer's modulation: (scale, shift) in the code, (shift, scale) in DiT.

    The published weights are trained with the code's order; read in DiT's, the two trade places.
    """
    return rows_of(
        "final-layer",
        Side("official", "scale, shift (official code)", study.base_scores),
        Side("swapped", "shift, scale (DiT's order)", study.score_samples(study.config, model=swapped(study.model))),
    )


def swapped(model: TokenBridge) -> TokenBridge:
    """Return a copy of the model whose final layer takes the shift for the scale, and the scale for the shift."""
    model = copy.deepcopy(model)
    linear = model.head.channel_final.adaLN_modulation[1]
    for parameter in linear.parameters():
        parameter.data = torch.cat(parameter.data.chunk(2)[::-1])
    return model


def head_cache(study: Study, *, num_positions: int = BATCH_SIZE, runs: int = 15) -> list[Row]:
    """Compare the head with and without key/value cache: the paper says it can have one, the code has none.

    Time is of the head alone: of `num_positions` at once, as many as there are images in a batch, and of one.
    """
    head = study.model.head
    assert isinstance(head, ARHead)
    generator = torch.Generator().manual_seed(study.seed)
    context = torch.randn(num_positions, study.model.config.width, generator=generator).to(study.bench.device)
    likeliest: Pick = lambda logits, place: logits.argmax(-1)  # noqa: E731

    def recomputed(context: Tensor) -> Tensor:
        return sample_without_cache(head, context, likeliest)

    def cached(context: Tensor) -> Tensor:
        return head.sample(context, likeliest)[0]

    with torch.inference_mode():
        differ = _share(recomputed(context) != cached(context))
        speed_up = _speed_up(lambda: recomputed(context), lambda: cached(context), runs)
        speed_up_of_one = _speed_up(lambda: recomputed(context[:1]), lambda: cached(context[:1]), runs)
    return [
        _row(f"head-cache-{name}", label, {"tokens that differ": d, "speed-up": many, "speed-up (one position)": one})
        for name, label, d, many, one in (
            ("recomputed", "whole prefix for each channel (official code)", 0.0, 1.0, 1.0),
            ("cached", "key/value cache", differ, speed_up, speed_up_of_one),
        )
    ]


def sample_without_cache(head: ARHead, context: Tensor, pick: Pick) -> Tensor:
    """Return what `ARHead.sample` does, tokens [N, C], by running the whole prefix anew for each channel.

    Source: models/tokenbridge.py, `_sample_channel_ar`.
    """
    condition = head.condition(context)  # [N, C, W]
    blocks = cast("list[ModulatedBlock]", list(head.channel_blocks))
    prefix, tokens = [condition[:, 0]], []
    for i in range(head.num_channels):
        x = torch.stack(prefix, dim=1) + head.channel_embed[:, : i + 1]
        for block in blocks:
            x = block(x, block.adaLN_modulation(condition[:, : i + 1]), is_causal=True)
        x = head.channel_final(head.channel_norm(x), condition[:, : i + 1])
        tokens.append(pick(head.channel_heads[i](x[:, i]), i))
        if i < head.num_channels - 1:
            prefix.append(head.token_embeddings[i](tokens[-1]))
    return torch.stack(tokens, dim=1)


def _speed_up(slow: Callable[[], object], fast: Callable[[], object], runs: int) -> float:
    """Return the ratio of median times, runs taken in turn so that both meet the same machine."""

    def seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times = [(seconds(slow), seconds(fast)) for _ in range(runs + 2)][2:]
    return statistics.median(s for s, _ in times) / statistics.median(f for _, f in times)


# ------------------------------------------------------------------------------------------------ quantising


def encode(study: Study) -> list[Row]:
    """Compare the nearest codebook value, which the code takes, with the bin of equation 3, which it never uses.

    The buffer `boundaries` holds the edges of the bins; halfway between two conditional means lies another value.
    On test images, on N(0, 1), and, without decoding, on latents from a file.
    """
    latents = study.scaled(study.posterior.mode())
    normal = torch.randn(NUM_VALUES, generator=torch.Generator().manual_seed(study.seed)).to(latents.device)
    given = None if study.latents is None else read_latents(study.latents).to(latents.device)
    quantizer, edges = study.model.quantizer, bin_edges(study.model)
    sides: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "nearest": ("nearest value (official code)", quantizer.encode),
        "boundary": ("bin between boundaries (paper)", lambda x: torch.bucketize(x, edges)),
    }
    rows, rows_of_given = [], []
    for name, (label, to_tokens) in sides.items():
        metrics = _against_nearest(quantizer, to_tokens, latents)
        metrics |= {f"{k} (N(0, 1))": v for k, v in _against_nearest(quantizer, to_tokens, normal).items()}
        rows.append(_row(f"encode-{name}", label, metrics | study.reconstruct(quantizer.lookup(to_tokens(latents)))))
        name, label = f"encode-{name}-given", f"{label}, given latents"
        if given is None:
            rows_of_given.append(_not_run(name, label, "no latents were given (--latents FILE)"))
        else:
            rows_of_given.append(_row(name, label, _against_nearest(quantizer, to_tokens, given)))
    return rows + rows_of_given


def bin_edges(model: TokenBridge) -> Tensor:
    """Return the inner edges [V - 1] of the bins, in latent units: the official buffer `boundaries`."""
    config: Any = model.config
    edges = official_buffers(model)["boundaries"] * (config.value_range / config.num_sigmas)
    return edges[1:-1].to(model.device)


def read_latents(path: Path) -> Tensor:
    """Read the array `latents` of an .npz file, divided by its standard deviation, as float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or its latents are not finite or all alike.
    """
    try:
        with np.load(path) as file:
            latents = torch.from_numpy(file["latents"]).float()
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no .npz file with an array `latents` of numbers: {error}") from error
    deviation = latents.double().std(correction=0).item()
    if not 0 < deviation < float("inf"):
        raise ValueError(f"The latents in {path} have the standard deviation {deviation}.")
    return latents / deviation


def _against_nearest(quantizer: ScalarQuantizer, to_tokens: Callable[[Tensor], Tensor], latents: Tensor) -> Scores:
    tokens = to_tokens(latents)
    error = (quantizer.lookup(tokens).double() - latents.double()).square().mean()
    return {
        "tokens that differ": _share(tokens != quantizer.encode(latents)),
        "relative MSE": (error / latents.double().var(correction=0)).item(),
    }


def _share(differ: Tensor) -> float:
    return differ.double().mean().item()


def gaussian_fit(study: Study) -> list[Row]:
    """Compare bins fitted to a deviation of 5/3, as the mapping of ±5 to ±3 makes them, with the latents' own 1."""
    config: Any = study.model.config
    latents = study.scaled(study.posterior.mode())
    sides = {
        "official": (config.value_range, f"fitted to a deviation of {config.value_range / config.num_sigmas:.3f}"),
        "unit": (config.num_sigmas, "fitted to a deviation of 1, the latents' own"),
    }
    rows = []
    for name, (value_range, label) in sides.items():
        quantizer = gaussian_quantizer(config.num_levels, value_range=value_range, num_sigmas=config.num_sigmas)
        quantizer.to(latents.device)
        error = {"relative MSE": _against_nearest(quantizer, quantizer.encode, latents)["relative MSE"]}
        rows.append(_row(f"gaussian-fit-{name}", label, error | study.reconstruct(quantizer(latents))))
    return rows


def posterior(study: Study) -> list[Row]:
    """Compare a sample of the autoencoder's posterior, as the official code takes, with its mean; 64 levels both."""
    quantizer = study.model.quantizer

    def draw(seed: int) -> Tensor:
        generator = torch.Generator(study.bench.device).manual_seed(seed)
        return study.scaled(study.posterior.sample(generator=generator))

    mean = study.scaled(study.posterior.mode())
    samples = [study.reconstruct(quantizer(draw(seed))) for seed in study.seeds]
    differ = _share(quantizer.encode(draw(study.seed)) != quantizer.encode(mean))
    return rows_of(
        "posterior",
        Side("sample", "a sample (official code)", samples, {"tokens that differ": differ}),
        Side("mean", "the mean", [study.reconstruct(quantizer(mean))], {"tokens that differ": 0.0}),
    )


# ----------------------------------------------------------------------------------------------- half precision


def tokens_precision(study: Study) -> list[Row]:
    """Compare generation under autocast, VAE included, with float32: the paper says bfloat16, the code takes float16.

    Of one seed and half the images: half precision is slow on a CPU.
    """
    labels = study.labels[: study.num_images // 2]

    def side(name: str, label: str, dtype: torch.dtype | None) -> tuple[str, str, Tensor, Tensor]:
        with _autocast(study, dtype):
            tokens = study.generate(study.config, labels, study.seed)
            return name, label, tokens, images_to_pixels(study.images(tokens))

    measured = [
        side("fp32", "float32", None),
        side("fp16", "float16 autocast (official code)", HALVES["fp16"]),
        side("bf16", "bfloat16 autocast (paper)", HALVES["bf16"]),
    ]
    exact = measured[0][2]
    return rows_of(
        "tokens",
        *(
            Side(
                name,
                label,
                [study.score(pixels, labels)],
                {
                    "generated tokens that differ": _share(tokens != exact),
                    "images that differ": _share((tokens != exact).flatten(1).any(1)),
                },
            )
            for name, label, tokens, pixels in measured
        ),
    )


def _autocast(study: Study, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(study.bench.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def latents_precision(study: Study) -> list[Row]:
    """Count the tokens of test images that flip when something before or in the quantiser is in half precision.

    The encoder under autocast; the latents rounded; the latents mapped to ±3 in half precision, as the official
    `quantize` does with what it is given; the codebook rounded.
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
        metrics = {f"tokens that differ ({what})": _share(t != tokens) for what, t in flips.items()}
        rows.append(_row(f"latents-{name}", f"{dtype}".removeprefix("torch."), metrics))
    return rows


# -------------------------------------------------------------------------------------- sampling and evaluation


def temperature(study: Study) -> list[Row]:
    """Compare TokenBridge-L's temperature in the README's command, 0.96, with that in table 4, 0.97."""
    sides = {0.96: "0.96 (README)", 0.97: "0.97 (table 4)"}
    return rows_of(
        "temperature",
        *(Side(f"{t}", label, study.score_samples(replace(study.config, temperature=t))) for t, label in sides.items()),
    )


def class_labels(study: Study) -> list[Row]:
    """Compare balanced labels, as TokenBridge and MAR are evaluated, with labels drawn at random, as LlamaGen is."""

    def random_labels(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(study.bench.scale.classes), (study.num_images,), generator=generator)

    scores = []
    for seed in study.seeds:
        labels = random_labels(seed)
        scores.append(study.score(images_to_pixels(study.images(study.generate(study.config, labels, seed))), labels))
    return rows_of(
        "labels",
        Side("balanced", "balanced (TokenBridge, MAR)", study.base_scores),
        Side("random", "drawn at random (LlamaGen)", scores),
    )


def llamagen_pixels(images: Tensor) -> Tensor:
    """Turn images in [-1, 1] to uint8 by LlamaGen's rule: 127.5 x + 128, clamped, then cut (sample_c2i_ddp.py)."""
    return (127.5 * images + 128.0).clamp(0, 255).to(torch.uint8)


def truncated_pixels(images: Tensor) -> Tensor:
    """Turn images in [-1, 1] to uint8 by cutting 255 y off, y in [0, 1], as torchvision's ToPILImage does."""
    return ((images + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)


def pixels(study: Study) -> list[Row]:
    """Compare ways to make 8 bits of the same images: rounded (TokenBridge, MAR), LlamaGen's, and cut off."""
    rules = {
        "rounded": ("rounded (TokenBridge, MAR)", images_to_pixels),
        "llamagen": ("127.5 x + 128, cut (LlamaGen)", llamagen_pixels),
        "truncated": ("255 y, cut", truncated_pixels),
    }
    rounded = [images_to_pixels(images) for images in study.base_images]
    sides = []
    for name, (label, rule) in rules.items():
        made = [rule(images) for images in study.base_images]
        differ = _share(torch.stack(made) != torch.stack(rounded))
        scores = [study.score(p, study.labels) for p in made]
        sides.append(Side(name, label, scores, {"pixels that differ": differ}))
    return rows_of("pixels", *sides)


def num_images(study: Study) -> list[Row]:
    """Show the bias of the Fréchet distance with few images: disjoint sets of the same samples, few and many."""
    images = torch.cat([images_to_pixels(images) for images in study.base_images])
    features, _ = extract_features(images, study.bench.classifier)

    def side(size: int) -> Side:
        sets = [part for part in features.split(size) if len(part) == size]
        name = f"FID-{study.bench.extractor}"
        scores = [{name: fidelity_distance(statistics_of(part), study.reference)} for part in sets]
        return Side(str(size), f"{size:,} images, mean of {len(sets)}", scores, {"images": float(size)})

    return rows_of("num-images", side(study.num_images // 2), side(2 * study.num_images))


# ------------------------------------------------------------------------------------------------- baselines


class EnvelopedDensity(givt.GuidedDensity):
    """The guided density of GIVT, under a constant that makes the proposal a true envelope."""

    def bound(self) -> Tensor:
        """Return the least constant [N, C] with density <= constant * proposal everywhere; infinite if none is."""
        c, u, w = self.conditional, self.unconditional, self.weight
        # The log of density over proposal is a parabola in x.
        curvature = (1 + w) / c.scale.square() - w / u.scale.square() - 1 / self.proposal.scale.square()
        top = c.loc + w * (c.loc - u.loc) / u.scale.square() / curvature
        height = (self.log_prob(top) - self.proposal.log_prob(top)).exp()
        return torch.where(curvature > 0, height, torch.inf)

    def standardised(self, x: Tensor) -> Tensor:
        """Return x [N, C] in units of the Gaussian that the density is; NaN where it is none."""
        c, u, w = self.conditional, self.unconditional, self.weight
        precision = (1 + w) / c.scale.square() - w / u.scale.square()
        mean = ((1 + w) * c.loc / c.scale.square() - w * u.loc / u.scale.square()) / precision
        return (x - mean) * precision.sqrt()


def givt_guidance(study: Study) -> list[Row]:
    """Compare GIVT's rejection sampling of the guided density with that under a true envelope, token by token.

    The official constant is searched on 1,001 points and divided by the proposal's highest density, so it may be
    too small. The tokens stand in images sampled the official way; both sides see the same densities and proposals.
    """
    sides: dict[str, tuple[str, type[givt.GuidedDensity]]] = {
        "official": ("constant of the official code", givt.GuidedDensity),
        "envelope": ("true envelope", EnvelopedDensity),
    }
    if not _has_weights(study, "givt"):
        reason = _no_weights("givt")
        return [_not_run(f"givt-guidance-rejection-{name}", label, reason) for name, (label, _) in sides.items()]
    config = study.bench.scale.recipe("givt").sampling
    assert isinstance(config, givt.GivtSamplingConfig)
    model: givt.GIVT = study.bench.model("givt")
    mixtures = givt_mixtures(model, config, study.labels[:NUM_GIVT_IMAGES], study.seed)
    draws, densities = zip(
        *(draw_by(kind, mixtures, config, study.seed + 1, model) for _, kind in sides.values()), strict=True
    )
    true = EnvelopedDensity(densities[0].conditional, densities[0].unconditional, densities[0].weight)
    envelope = true.bound()
    # Judged where both sides drew from the density, and where that is a Gaussian: the same tokens.
    standardised = [true.standardised(draw.values) for draw in draws]
    both = torch.stack([_first(d) >= 0 for d in draws]).all(0) & standardised[0].isfinite()
    rows = []
    for (name, (label, _)), draw, drawn in zip(sides.items(), draws, standardised, strict=True):
        first, bound = _first(draw), draw.bound
        assert bound is not None
        metrics = {
            "fallbacks": _share(first < 0),
            "acceptance": (first >= 0).sum().item() / max(1, (first[first >= 0] + 1).sum().item()),
            # A little slack: the two constants are computed in different ways, in float32.
            "not covered": _share((bound < envelope * (1 - 1e-4)) & bound.isfinite()),
            "deviation of draws": drawn[both].double().std().item(),
        }
        rows.append(_row(f"givt-guidance-rejection-{name}", label, metrics))
    return rows


@torch.inference_mode()
def givt_mixtures(
    model: givt.GIVT, config: givt.GivtSamplingConfig, labels: Tensor, seed: int
) -> tuple[givt.Mixture, givt.Mixture]:
    """Return conditional and unconditional mixtures [N L] of every token of images sampled the official way."""
    indices, labels = list(range(len(labels))), labels.to(model.device)
    latents = givt.generate_latents(model, labels, config, lambda i: givt.StreamNoise(seed, indices, i, model))
    sequence = model.to_sequence(latents)
    none = torch.ones_like(labels, dtype=torch.bool)
    logits = [model(sequence, labels, dropped=dropped).flatten(0, 1) for dropped in (~none, none)]
    conditional, unconditional = (
        model.mixture(part, temperature=config.temperature, temp_probs=config.temp_probs) for part in logits
    )
    return conditional, unconditional


def draw_by(
    kind: type[givt.GuidedDensity],
    mixtures: tuple[givt.Mixture, givt.Mixture],
    config: givt.GivtSamplingConfig,
    seed: int,
    model: givt.GIVT,
) -> tuple[givt.Draw, givt.GuidedDensity]:
    """Draw every token anew, as `givt.draw_token` does, from a density of the given kind; a stream for each token."""
    conditional, unconditional = mixtures
    noise = givt.StreamNoise(seed, list(range(len(conditional.log_weights))), 0, model)
    component = (conditional.log_weights + noise.gumbels()).argmax(-1)
    plain = conditional.component(component)
    values = plain.at(noise.normals(component))
    density = kind(plain, unconditional.component(component), config.guidance_weight)
    return givt.draw_guided(density, values, noise, config.num_proposals), density


def _first(draw: givt.Draw) -> Tensor:
    assert draw.first_accepted is not None
    return draw.first_accepted


def llamagen_zero_row(study: Study) -> list[Row]:
    """Compare the class token's rotary row of LlamaGen: all zeros in the code, where no rotation is cosine 1, sine 0.

    With zeros the class token's key is zero, and every element gives it the score 0, whatever the class is. The
    weights are trained with zeros; this shows how far they rest on it.
    """
    official, turned = "zeros (official code)", "cosine 1, sine 0"
    if not (_has_weights(study, "llamagen") and _has_weights(study, "vq")):
        reason = _no_weights("llamagen or vq")
        return [_not_run(f"llamagen-zero-row-{n}", t, reason) for n, t in (("official", official), ("rotated", turned))]
    model: llamagen.LlamaGen = study.bench.model("llamagen")
    config = study.bench.scale.recipe("llamagen").sampling
    assert isinstance(config, llamagen.LlamaGenSampling)

    def generate(model: llamagen.LlamaGen, seed: int) -> Tensor:
        tokens = []
        for indices in image_batches(study.num_images, BATCH_SIZE, show_progress=False):
            uniforms = image_noise(seed, indices, model.num_positions, 1).uniforms[..., 0]
            tokens.append(llamagen.generate_tokens(model, study.labels[indices], config, uniforms))
        return torch.cat(tokens)

    def scores(tokens: Tensor) -> Scores:
        grids = tokens.unflatten(1, (model.latent_size, model.latent_size)).split(BATCH_SIZE)
        return study.score(torch.cat([images_to_pixels(study.bench.vq.decode(g)).cpu() for g in grids]), study.labels)

    tokens = [[generate(m, seed) for seed in study.seeds] for m in (model, rotated(model))]
    differ = [_share(torch.stack(side) != torch.stack(tokens[0])) for side in tokens]
    named = zip(("official", "rotated"), (official, turned), tokens, differ, strict=True)
    return rows_of(
        "llamagen-zero-row",
        *(
            Side(name, label, [scores(t) for t in side], {"generated tokens that differ": d})
            for name, label, side, d in named
        ),
    )


def rotated(model: llamagen.LlamaGen) -> llamagen.LlamaGen:
    """Return a copy of the model whose class token is turned by nothing, instead of being multiplied by zero."""
    model = copy.deepcopy(model)
    rows = model.rotary_rows()
    rows[: model.rotary[2], :, 0] = 1.0
    model.rotary_rows = lambda: rows  # type: ignore[method-assign]
    return model


def _not_run(name: str, label: str, reason: str) -> Row:
    return Row(id=f"discrepancies/{name}", label=label, metrics={}, not_run=reason)


def _has_weights(study: Study, name: str) -> bool:
    return (study.bench.weights / name / WEIGHTS_FILE).is_file()


def _no_weights(name: str) -> str:
    return f"there are no weights of {name}; `tokenbridge train` makes them"


# ------------------------------------------------------------------------------------------------------ the run

COMPARISONS: dict[str, tuple[str, Callable[[Study], list[Row]]]] = {
    "first-element": ("First element of the head's sequence", first_element),
    "final-layer": ("Order of the final layer's modulation", final_layer),
    "head-cache": ("Key/value cache of the head", head_cache),
    "temperature": ("Temperature of TokenBridge-L", temperature),
    "encode": ("Encoding: nearest value or bin", encode),
    "gaussian-fit": ("What the Gaussian bins are fitted to", gaussian_fit),
    "posterior": ("Posterior of the autoencoder, reconstruction with 64 levels", posterior),
    "tokens": ("Generation in half precision, one seed, half the images", tokens_precision),
    "latents": ("Quantising in half precision: tokens that differ from float32", latents_precision),
    "labels": ("Class labels of the samples", class_labels),
    "pixels": ("Images to 8 bits", pixels),
    "num-images": ("Number of images", num_images),
    "givt-guidance": ("GIVT: rejection sampling of the guided density", givt_guidance),
    "llamagen-zero-row": ("LlamaGen: rotary row of the class token", llamagen_zero_row),
}
"""Title and function of each comparison."""


def trends(rows: Sequence[Row], extractor: str) -> list[Trend]:
    """Tell which changes of the Fréchet distance are lost in the seeds' noise: at most two of its deviations."""
    asked = {
        "first-element-training": "the head's first element",
        "final-layer-swapped": "the order of the final layer's modulation",
        "temperature-0.97": "temperature 0.97 instead of 0.96",
        "labels-random": "labels at random instead of balanced",
        "pixels-truncated": "pixels cut off instead of rounded",
        "llamagen-zero-row-rotated": "LlamaGen's rotary row of the class token",
    }
    name = f"FID-{extractor}"
    by_side = {row.id.removeprefix("discrepancies/"): row.metrics for row in rows if row.not_run is None}
    found = []
    for side in asked.keys() & by_side.keys():
        comparison = side.rpartition("-")[0]
        noise = next(metrics for other, metrics in by_side.items() if other.startswith(comparison))[f"± {name}"]
        if noise > 0:
            ratio = round(abs(by_side[side][f"change of {name}"]) / noise, 4)
            claim = f"{asked[side]} is lost in the seeds' noise (change of {name} over its deviation)"
            found.append(Trend(id=f"noise-{comparison}", claim=claim, measured=ratio, relation="<=", bound=2.0))
    return sorted(found, key=lambda trend: trend.id)


def measure_discrepancies(
    scale: Scale,
    *,
    weights: Path | str,
    out: Path | str,
    latents: Path | None = None,
    num_images: int = 1000,
    seed: int = 0,
    say: Say = lambda text: print(text, file=sys.stderr),
) -> Results:
    """Measure every comparison at a scale; write results.json and tables.md into `out`.

    Args:
        scale: whose models and images.
        weights: folder of the scale's models.
        out: folder for what is made.
        latents: real latents to quantise, .npz (see `read_latents`); rows about them are not run without.
        num_images: samples of each seed, spread evenly over the classes.
        seed: the first of NUM_SEEDS.
        say: told what is going on.

    Raises:
        FileNotFoundError: weights of the autoencoder, the classifier or TokenBridge, or the latents, are missing.
        ValueError: latents of another kind, or `num_images` is no multiple of twice the classes.
    """
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    if num_images < 1 or num_images % (2 * len(scale.classes)):
        raise ValueError(f"The number of images must be a multiple of twice the {len(scale.classes)} classes.")
    if latents is not None:
        read_latents(latents)  # first: a bad file must not cost minutes
    bench = open_bench(scale, weights)
    study = Study(bench, num_images, seed, latents)
    rows = []
    for title, compare in COMPARISONS.values():
        say(title)
        rows += compare(study)
    given = {} if latents is None else {f"given latents ({latents.name})": sha256_of(latents)}
    measured = Results(
        scale=scale.name,
        provenance=Provenance(
            command=provenance.command(),
            seed=seed,
            started=started.isoformat(timespec="seconds"),
            wall_seconds=round(time.perf_counter() - clock, 1),
            **provenance.commit(),
            versions=provenance.versions(),
            hardware=provenance.hardware(),
            data_sha256={
                f"{scale.data}/{split}": provenance.hash_of_dataset(load_images(scale.data, split))
                for split in ("train", "test")
            }
            | given,
            weights_sha256={
                f"{name}/{file.name}": sha256_of(file)
                for name in ("vae", "vq", "classifier", MAIN_SYSTEM, "givt", "llamagen")
                for file in (Path(weights) / name / "config.json", Path(weights) / name / WEIGHTS_FILE)
                if file.is_file()
            },
            settings={
                "num_images": num_images,
                "num_seeds": NUM_SEEDS,
                **{recipe.name: dataclasses.asdict(recipe.sampling) for recipe in scale.recipes if recipe.sampling},
            },
        ),
        rows=rows,
        trends=trends(rows, bench.extractor),
    )
    write(Path(out) / "results.json", measured)
    write_text(Path(out) / "tables.md", to_markdown(measured))
    return measured


def by_comparison(results: Results) -> dict[str, list[Row]]:
    """Return the rows of each comparison by its title."""
    found: dict[str, list[Row]] = {title: [] for title, _ in COMPARISONS.values()}
    for row in results.rows:
        side = row.id.removeprefix("discrepancies/")
        name = max((c for c in COMPARISONS if side.startswith(f"{c}-")), key=len)
        found[COMPARISONS[name][0]].append(row)
    return found


def to_markdown(results: Results) -> str:
    """Return all comparisons as one Markdown page."""
    p = results.provenance
    lines = [f"# What the discrepancies do, at scale {results.scale}", ""]
    lines += [
        f"Measured by `{p.command}` ({p.settings['num_images']:,} samples of each of {p.settings['num_seeds']} seeds, "
        f"the first {p.seed}) in {p.wall_seconds:.0f} s, {p.started}, commit "
        f"{p.commit or 'unknown'}{' with uncommitted changes' if p.dirty else ''}. "
        "±: standard deviation over seeds. Change: from the first row, seed by seed.",
        "",
    ]
    for title, rows in by_comparison(results).items():
        run = [row for row in rows if row.not_run is None]
        lines += [f"## {title}", ""]
        if run:
            columns = columns_of(run)
            lines += [*markdown_table(["", *columns], [[r.label, *[cell(r, c) for c in columns]] for r in run]), ""]
        lines += [f"- {row.label}: not run: {row.not_run}" for row in rows if row.not_run] + [""] * (
            len(run) < len(rows)
        )
    if results.trends:
        lines += ["## Lost in the noise of seeds?", ""]
        lines += markdown_table(TREND_COLUMNS, [trend_cells(trend) for trend in results.trends])
    return "\n".join(lines)
