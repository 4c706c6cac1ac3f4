"""What a recipe consists of: a model, how it is trained, how it is sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenbridge.utils.errors import UserError

LOG_EVERY = 20  # steps between two points of the loss curve (each is the mean over these steps)


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast to train."""

    num_steps: int
    batch_size: int = 128  # images per step, over all processes
    learning_rate: float = 1e-3  # reached at the end of the warm-up
    warmup_steps: int = 100
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    ema_decay: float = 0.999  # diffusers ramps it up: min(this, (1 + step) / (10 + step))
    max_grad_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 500  # steps

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 1:
            raise UserError("num_steps and batch_size must be at least 1.")
        if self.checkpoint_every % LOG_EVERY:
            # Only then is every checkpoint preceded by a look at the loss, and no half-filled mean is lost.
            raise UserError(f"checkpoint_every must be a multiple of {LOG_EVERY}, not {self.checkpoint_every}.")


@dataclass(frozen=True)
class Recipe:
    """One model and how it is trained."""

    name: str
    kind: str  # a system's name (models/registry.py), or autoencoder, vq, classifier
    model: dict[str, Any]  # keyword arguments of the model's class
    training: TrainingConfig
    loss: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the loss
    measured: dict[str, str] = field(default_factory=dict)  # what the system measures on latents, see System.measure
    sampling: Any = None  # settings of a generator, which is what has them
    optional: bool = False  # trained only when asked for by name

    @property
    def is_generator(self) -> bool:
        """Whether the model makes images, and is trained on what a tokenizer makes of them."""
        return self.sampling is not None


@dataclass(frozen=True)
class Scale:
    """A data set, and the recipes that belong to it."""

    name: str
    data: str  # for `load_images`
    extractor: str  # what scores by this scale's classifier are called after: FID-digits, ...
    image_size: int
    channels: int
    classes: tuple[str, ...]
    with_mirrored: bool  # whether a mirrored image is as good as the image
    recipes: tuple[Recipe, ...]

    def recipe(self, name: str) -> Recipe:
        """Return the recipe called `name`.

        Raises:
            ValueError: there is none.
        """
        for recipe in self.recipes:
            if recipe.name == name:
                return recipe
        raise UserError(f"Unknown recipe {name!r} at scale {self.name}; there are {[r.name for r in self.recipes]}.")
