"""The parts that all comparisons of paper and code share: arms, seeds, rows."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenbridge.configs.scales import find_model_folder
from tokenbridge.data.images import images_to_pixels, pixels_to_images
from tokenbridge.evaluation.metrics import (
    Statistics,
    extract_features,
    frechet_distance,
    inception_score,
    statistics_of,
)
from tokenbridge.evaluation.reconstruct import reconstruction_scores
from tokenbridge.models.noise import PerImage
from tokenbridge.models.tokenbridge import sampling
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling
from tokenbridge.reproduction.workbench import MAIN_SYSTEM, Workbench
from tokenbridge.results.schema import Row
from tokenbridge.results.score import Score, change_of, deviation_of, read_name, to_metrics
from tokenbridge.sampling.sample import image_batches
from tokenbridge.utils.errors import UnusableImageError
from tokenbridge.weights.diffusers import WEIGHTS_FILE

if TYPE_CHECKING:
    from tokenbridge.models.tokenbridge.model import TokenBridge


NUM_SEEDS = 3
BATCH_SIZE = 250
Scores = dict[str, float]  # values by the name of the score (results/score.py)


@dataclass(frozen=True)
class Study:
    """The models, images, seeds and samples that the comparisons share."""

    bench: Workbench
    num_images: int  # samples of each seed
    seed: int  # the first of NUM_SEEDS
    latents: Path | None = None  # a file of real latents to quantise, as `read_latents` takes it

    @property
    def seeds(self) -> range:
        """The seeds of samples."""
        return range(self.seed, self.seed + NUM_SEEDS)

    @property
    def labels(self) -> Tensor:
        """Balanced labels [N], one class after the other in turn."""
        return torch.arange(self.num_images) % len(self.bench.scale.classes)

    @property
    def config(self) -> TokenBridgeSampling:
        """The tiny TokenBridge's own sampling settings."""
        config = self.bench.scale.recipe(MAIN_SYSTEM).sampling
        assert isinstance(config, TokenBridgeSampling)
        return config

    @functools.cached_property
    def model(self) -> TokenBridge:
        """TokenBridge with 64 levels."""
        model: TokenBridge = self.bench.model(MAIN_SYSTEM)
        return model

    @functools.cached_property
    def reference(self) -> Statistics:
        """The statistics of the training images' features."""
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
        self, config: TokenBridgeSampling, labels: Tensor, seed: int, *, model: TokenBridge | None = None
    ) -> Tensor:
        """Return tokens [N, L, C] of one image for each label.

        Raises:
            UnusableImageError: the logits are NaN.
        """
        model = model or self.model
        batches = image_batches(len(labels), BATCH_SIZE, show_progress=False)
        tokens = torch.cat([sampling.generate(model, labels[i], config, PerImage(seed, i)) for i in batches])
        if int(tokens.min()) < 0:
            raise UnusableImageError("The logits of the generator are NaN.")
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
        return to_metrics(
            [
                Score("FID", frechet_distance(statistics_of(features), self.reference), self.bench.extractor),
                Score("IS", inception_score(logits, 0)[0], self.bench.extractor),
                Score("class accuracy", (logits.argmax(1) == labels).double().mean().item()),
            ]
        )

    def score_samples(self, config: TokenBridgeSampling, *, model: TokenBridge | None = None) -> list[Scores]:
        """Sample by `config` and score, for each seed."""
        if (config, model) == (self.config, None):
            return self.base_scores
        tokens = [self.generate(config, self.labels, seed, model=model) for seed in self.seeds]
        return [self.score(images_to_pixels(self.images(t)), self.labels) for t in tokens]

    @functools.cached_property
    def base_scores(self) -> list[Scores]:
        """Scores of the recipe's own samples, for each seed."""
        return [self.score(images_to_pixels(images), self.labels) for images in self.base_images]

    def reconstruct(self, latents: Tensor) -> Scores:
        """Return PSNR, SSIM, rFID and IS of the test images, decoded from (quantised) latents."""
        pixels = images_to_pixels(self.decode(latents))
        scores = reconstruction_scores(
            self.bench.test_pixels, pixels, classifier=self.bench.classifier, extractor=self.bench.extractor
        )
        return to_metrics(scores)


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison."""

    name: str
    label: str
    scores: Sequence[Scores]  # one for each seed
    also: Scores = dataclasses.field(default_factory=dict)  # values that are measured once, not for each seed


def rows_of(comparison: str, *arms: Arm) -> list[Row]:
    """Return a row for each arm with means over seeds, their deviation, and the change from the first arm."""
    rows = []
    for arm in arms:
        metrics: Scores = {}
        for name in arm.scores[0]:
            values = [scores[name] for scores in arm.scores]
            metrics |= {name: statistics.fmean(values), **_deviation(name, values)}
            if arm is not arms[0] and len(arms[0].scores) == len(values) and read_name(name).metric == "FID":
                changes = [value - scores[name] for value, scores in zip(values, arms[0].scores, strict=True)]
                name = change_of(name)
                metrics |= {name: statistics.fmean(changes), **_deviation(name, changes)}
        rows.append(row_of(f"{comparison}-{arm.name}", arm.label, {**metrics, **arm.also}))
    return rows


def row_of(name: str, label: str, metrics: Scores) -> Row:
    """Return a row with metrics that are rounded to eight decimals."""
    return Row(id=f"discrepancies/{name}", label=label, metrics={k: round(v, 8) for k, v in metrics.items()})


def _deviation(name: str, values: Sequence[float]) -> Scores:
    return {deviation_of(name): statistics.stdev(values)} if len(values) > 1 else {}


def speed_up(slow: Callable[[], object], fast: Callable[[], object], runs: int) -> float:
    """Return the ratio of median times. The two run in turn, so that both see the same load of the machine."""

    def seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times = [(seconds(slow), seconds(fast)) for _ in range(runs + 2)][2:]
    return statistics.median(s for s, _ in times) / statistics.median(f for _, f in times)


def share(differ: Tensor) -> float:
    """Return the share of a tensor, of any shape, that is true."""
    return differ.double().mean().item()


def not_run_row(name: str, label: str, reason: str) -> Row:
    """Return a row that was not run."""
    return Row(id=f"discrepancies/{name}", label=label, metrics={}, not_run=reason)


def has_weights(study: Study, name: str) -> bool:
    """Whether there are weights of a model of the scale."""
    return (find_model_folder(study.bench.scale, name, study.bench.weights) / WEIGHTS_FILE).is_file()


def no_weights(name: str) -> str:
    """Return the reason why the comparisons of a model without weights are not run."""
    return f"there are no weights of {name}; `tokenbridge train` makes them"
