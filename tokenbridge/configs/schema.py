"""The dataclasses of a recipe (a model, how it is trained and how it is sampled) and of a scale."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenbridge.utils.errors import UserError

TRAINING_LOG = "loss.json"  # in the folder of a training's run
LOG_EVERY = 20  # steps between two points of the loss curve (each is the mean over these steps)


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of the training loop."""

    num_steps: int
    batch_size: int = 128  # images per step, over all processes
    learning_rate: float = 1e-3  # reached at the end of the warm-up
    warmup_steps: int = 100
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    ema_decay: float = 0.999  # diffusers ramps the decay up: min(ema_decay, (1 + step) / (10 + step))
    max_grad_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 500  # steps

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 1:
            raise UserError("num_steps and batch_size must be at least 1.")
        if self.checkpoint_every % LOG_EVERY:
            # Otherwise a checkpoint might follow a loss that was not checked yet, and would lose part of a mean.
            raise UserError(f"checkpoint_every must be a multiple of {LOG_EVERY}, not {self.checkpoint_every}.")


@dataclass(frozen=True)
class Recipe:
    """One model, and how it is trained and sampled."""

    name: str
    kind: str  # a system's name (models/registry.py), or autoencoder, vq, classifier
    model: dict[str, Any]  # keyword arguments of the model's class
    training: TrainingConfig
    loss: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the loss
    measured: dict[str, str] = field(default_factory=dict)  # keyword arguments of `System.measure`
    sampling: Any = None  # sampling settings; only generators have them
    optional: bool = False  # the model is trained only if it is named

    @property
    def is_generator(self) -> bool:
        """Whether the model makes images; it is then trained on latents or tokens."""
        return self.sampling is not None


@dataclass(frozen=True)
class Scale:
    """A data set, and the recipes of the models that are trained on it."""

    name: str
    data: str  # the data set, as `load_images` names it
    extractor: str  # suffix of the scores that this scale's classifier gives: FID-digits, ...
    image_size: int
    channels: int
    classes: tuple[str, ...]
    with_mirrored: bool  # generators are trained on mirrored images too
    recipes: tuple[Recipe, ...]

    def recipe(self, name: str) -> Recipe:
        """Return the recipe called `name`.

        Raises:
            UserError: no recipe of this scale has this name.
        """
        for recipe in self.recipes:
            if recipe.name == name:
                return recipe
        names = ", ".join(recipe.name for recipe in self.recipes)
        raise UserError(f"Unknown recipe {name!r} at scale {self.name}; there are {names}.")
