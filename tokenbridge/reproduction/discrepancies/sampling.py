"""Discrepancies in sampling and evaluation: temperature, labels, pixels, number of images."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenbridge.data.images import images_to_pixels, llamagen_pixels, truncated_pixels
from tokenbridge.evaluation.metrics import extract_features, frechet_distance, statistics_of
from tokenbridge.reproduction.discrepancies.study import Arm, Study, rows_of, share
from tokenbridge.results.schema import Row
from tokenbridge.results.score import Score, to_metrics


def temperature(study: Study) -> list[Row]:
    """Compare TokenBridge-L's temperature in the README's command, 0.96, with 0.97 in table 4."""
    arms = {0.96: "0.96 (README)", 0.97: "0.97 (table 4)"}
    return rows_of(
        "temperature",
        *(Arm(f"{t}", label, study.score_samples(replace(study.config, temperature=t))) for t, label in arms.items()),
    )


def class_labels(study: Study) -> list[Row]:
    """Compare balanced labels, which TokenBridge and MAR are evaluated with, with LlamaGen's random labels."""

    def random_labels(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(len(study.bench.scale.classes), (study.num_images,), generator=generator)

    scores = []
    for seed in study.seeds:
        labels = random_labels(seed)
        scores.append(study.score(images_to_pixels(study.images(study.generate(study.config, labels, seed))), labels))
    return rows_of(
        "labels",
        Arm("balanced", "balanced (TokenBridge, MAR)", study.base_scores),
        Arm("random", "drawn at random (LlamaGen)", scores),
    )


def pixels(study: Study) -> list[Row]:
    """Compare ways to convert the same images to 8 bits: rounding (TokenBridge, MAR), LlamaGen's, and truncation."""
    rules = {
        "rounded": ("rounded (TokenBridge, MAR)", images_to_pixels),
        "llamagen": ("127.5 x + 128, cut (LlamaGen)", llamagen_pixels),
        "truncated": ("255 y, cut", truncated_pixels),
    }
    rounded = [images_to_pixels(images) for images in study.base_images]
    arms = []
    for name, (label, rule) in rules.items():
        made = [rule(images) for images in study.base_images]
        differ = share(torch.stack(made) != torch.stack(rounded))
        scores = [study.score(p, study.labels) for p in made]
        arms.append(Arm(name, label, scores, {"pixels that differ": differ}))
    return rows_of("pixels", *arms)


def num_images(study: Study) -> list[Row]:
    """Show the bias of the Fréchet distance with few images, by small and large disjoint sets of the same samples."""
    images = torch.cat([images_to_pixels(images) for images in study.base_images])
    features, _ = extract_features(images, study.bench.classifier)

    def arm(size: int) -> Arm:
        sets = [part for part in features.split(size) if len(part) == size]
        fids = [frechet_distance(statistics_of(part), study.reference) for part in sets]
        scores = [to_metrics([Score("FID", fid, study.bench.extractor)]) for fid in fids]
        return Arm(
            str(size), f"{size:,} images, {len(sets)} set{'s' * (len(sets) > 1)}", scores, {"images": float(size)}
        )

    return rows_of("num-images", arm(study.num_images // 2), arm(2 * study.num_images))
