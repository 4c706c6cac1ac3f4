"""A miniature of the tiny scale: few digits, models and trainings that take no time, and one reproduction of it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from tokenbridge.configs.schema import Scale, TrainingConfig
from tokenbridge.configs.tiny import TINY
from tokenbridge.data.sources import load_images
from tokenbridge.models.masked_sampling import MaskedSampling
from tokenbridge.reproduction.small_scale import reproduce_scale
from tokenbridge.results.schema import Results
from tokenbridge.training.train import train_recipe

DATA = "mini-digits"  # a folder in the working directory of these tests
GENERATORS = ("tokenbridge-64", "mar", "givt", "llamagen")
TRAINED = ("vae", "vq", "classifier", *GENERATORS)
NOT_TRAINED = ("parallel-64", "tokenbridge-16", "tokenbridge-64-natural")
TIMES = {"seconds per image", "ms per position", "± ms", "speed-up", "against diffusion"}

STEPS = TrainingConfig(num_steps=5, batch_size=8, warmup_steps=2, learning_rate=1e-3)
SMALLER: dict[str, dict[str, Any]] = {
    "autoencoder": {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4},
    "vq": {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "num_vq_embeddings": 16, "vq_embed_dim": 4},
    "classifier": {"widths": (8, 8, 8, 8)},
    "tokenbridge": {
        **{"num_channels": 4, "width": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "num_buffer": 2},
        **{"head_width": 16, "head_depth": 1, "head_num_heads": 2},
    },
    "mar": {
        **{"num_channels": 4, "width": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "num_buffer": 2},
        **{"head_width": 16, "head_depth": 1},
    },
    "givt": {"num_channels": 4, "num_components": 2, "width": 16, "depth": 1, "num_heads": 2, "mlp_width": 16},
    "llamagen": {"num_codes": 16, "width": 16, "depth": 1, "num_heads": 2, "hidden_multiple": 16},
}


def miniature(scale: Scale = TINY) -> Scale:
    """Return `scale` with the same recipes, of models and trainings that take no time."""
    small = []
    for recipe in scale.recipes:
        sampling = recipe.sampling
        if isinstance(sampling, MaskedSampling):
            sampling = dataclasses.replace(sampling, num_iterations=4)
        model = {**recipe.model, **SMALLER[recipe.kind]}
        small.append(dataclasses.replace(recipe, model=model, training=STEPS, sampling=sampling))
    return dataclasses.replace(scale, name="mini", data=DATA, recipes=tuple(small))


MINI = miniature()


@dataclasses.dataclass(frozen=True)
class World:
    """A working directory with the miniature's data, trained weights, and results of one reproduction."""

    root: Path
    logs: dict[str, dict[str, Any]]
    results: Results

    @property
    def weights(self) -> Path:
        return self.root / "runs" / "weights"

    @property
    def reference(self) -> Path:
        return self.root / "first" / "results.json"


@functools.cache
def some_digits(split: str, per_class: int) -> Dataset:
    dataset = load_images("digits", split)
    count = len(dataset) // 10
    return dataset.select([c * count + i for c in range(10) for i in range(per_class)])


def build_world(root: Path) -> World:
    """Train the miniature in an empty folder, which must be the working directory, and reproduce it."""
    (root / DATA).mkdir()
    some_digits("train", 6).to_parquet(root / DATA / "train.parquet")
    some_digits("test", 3).to_parquet(root / DATA / "test.parquet")
    torch.manual_seed(1234)  # nothing below may depend on it
    logs = {
        name: train_recipe(MINI, name, weights="runs/weights", runs="runs", show_progress=False) for name in TRAINED
    }
    measured, _ = reproduce_scale(MINI, weights="runs/weights", out="first", reference=None, num_images=20)
    return World(root, logs, measured)
