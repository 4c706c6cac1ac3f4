"""Training, saving and loading the model of a recipe.

A folder of models has one sub-folder for each recipe, in diffusers' format (`config.json` and safetensors). Weights are
in half precision on disk and in float32 when loaded. The checkpoint and the loss curve of a training run are in another
folder, that of the run.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from tokenbridge.configs.scales import find_model_folder, has_other_images, is_shipped
from tokenbridge.data.images import pixels_to_images, to_pixels
from tokenbridge.data.latents import cache_latents, encode_images
from tokenbridge.data.sources import cropped, labels_of, load_images
from tokenbridge.evaluation.classifier import Classifier, classifier_loss
from tokenbridge.models.registry import SYSTEMS
from tokenbridge.tokenizers.base import VQTokenizer, autoencoder_loss, sample_posterior, vq_loss
from tokenbridge.training.loop import CHECKPOINT, LOGS, train
from tokenbridge.utils import files, provenance
from tokenbridge.utils.devices import best_device
from tokenbridge.utils.errors import MissingFileError, UserError
from tokenbridge.utils.files import check_replaceable, make_folder, write_json
from tokenbridge.utils.hashed import recording
from tokenbridge.utils.processes import locked_by_launch
from tokenbridge.weights.diffusers import MODEL_FILES, WEIGHTS_FILE, load_model, save_model

if TYPE_CHECKING:
    from datasets import Dataset

    from tokenbridge.configs.schema import Recipe, Scale


TOKENIZERS_AND_CLASSIFIER: dict[str, Any] = {"autoencoder": AutoencoderKL, "vq": VQModel, "classifier": Classifier}


def model_class(kind: str) -> Any:
    """Return the class of a recipe's model."""
    return SYSTEMS[kind].model if kind in SYSTEMS else TOKENIZERS_AND_CLASSIFIER[kind]


def build(recipe: Recipe, **overrides: Any) -> Any:
    """Return the recipe's model, initialised from its training seed; `overrides` replace arguments of its class."""
    torch.manual_seed(recipe.training.seed)
    return model_class(recipe.kind)(**recipe.model, **overrides)


def load(scale: Scale, name: str, weights: Path | str) -> Any:
    """Load a model of a scale from a folder of models (see `find_model_folder`), in float32 and evaluation mode.

    Raises:
        MissingFileError: the model is missing; the message says where it should be and how to train it.
        UserError: the model's files are damaged or hold another model.
    """
    recipe = scale.recipe(name)
    try:
        return load_model(model_class(recipe.kind), find_model_folder(scale, name, weights), recipe.model)
    except FileNotFoundError as error:
        raise MissingFileError(
            f"The model {name!r} is missing. {error} {how_to_train(scale, name, weights)}."
        ) from error


def how_to_train(scale: Scale, name: str, weights: Path | str) -> str:
    """Return what makes a model that a folder of models lacks; no name stands for all models."""
    data = f" --data {scale.data}" if has_other_images(scale) else ""
    command = f"tokenbridge train {scale.name} {name}".rstrip() + data
    what = "it" if name else "them"
    weights = Path(weights)
    if weights.name == "weights" and not weights.is_relative_to(files.reference_folder()):
        return f"`{command} --out {weights.parent}` makes {what}"
    return f"`{command}` makes {what} in runs/{scale.name}-training/weights, which --weights can name"


def train_recipe(
    scale: Scale, name: str, *, weights: Path | str, runs: Path | str, show_progress: bool = True
) -> dict[str, Any]:
    """Train the recipe `name` of a scale; save the model to `weights/name` and its log to `runs/name`.

    A generator is trained on the scale's tokenizer in `weights`, or on the shipped one (see `find_model_folder`): `vq`
    for systems that model codes (LlamaGen), and `vae` for all others.

    Returns:
        The training log (see `loop.train`), with the recipe, the command and the versions.
    """
    recipe = scale.recipe(name)
    runs = Path(runs) / name
    folder = Path(weights) / name
    with locked_by_launch(runs):
        # Before hours of work whose results they are to hold:
        make_folder(runs, CHECKPOINT, *LOGS)
        check_replaceable(folder, MODEL_FILES)
        changes: dict[str, Any] = {}
        options: dict[str, Any] = {}
        with recording() as read:
            if not recipe.is_generator:
                dataset = images_of(scale, "train")
            elif (system := SYSTEMS[recipe.kind]).codes:
                dataset = tokens_of(scale, weights)
                options = {"with_mirrored": scale.with_mirrored}
            else:
                dataset = latents_of(scale, weights, runs.parent / "latents")
                options = {"scaling": _autoencoder_scaling(scale, weights), "with_mirrored": scale.with_mirrored}
                if system.measure is not None:
                    changes = system.measure(_some_latents(dataset), **recipe.measured)
        model = build(recipe, **changes)
        loss = functools.partial(step_of(recipe), **options, **recipe.loss)
        log = train(model, dataset, loss, recipe.training, runs, name=name, show_progress=show_progress)
        log |= {
            "name": name,
            "recipe": {
                "model": recipe.model,
                "loss": recipe.loss,
                "measured": recipe.measured,
                "data": scale.data,
            },
            "command": provenance.command(),
            **provenance.origin(),
        }
        if recipe.is_generator:
            tokenizer = SYSTEMS[recipe.kind].recipe
            log["tokenizer"] = {
                "name": tokenizer,
                "shipped": is_shipped(scale, tokenizer, weights),
                "sha256": read[find_model_folder(scale, tokenizer, weights) / WEIGHTS_FILE],
            }
        if recipe.kind == "autoencoder":
            model.register_to_config(scaling_factor=_measure_scaling(model, dataset))
        if PartialState().is_main_process:
            write_json(runs / "loss.json", log)
            save_model(model, folder)
        PartialState().wait_for_everyone()
        return log


def images_of(scale: Scale, split: str) -> Dataset:
    """Return a split of the scale's images, with the columns `images` (float32 [C, H, W] in [-1, 1]) and `labels`."""

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        pixels = to_pixels(batch["image"], channels=scale.channels)
        return {"images": pixels_to_images(pixels), "labels": torch.tensor(batch["label"])}

    return cropped(labelled_images(scale, split), scale.image_size, scale.channels).with_transform(transform)


def labelled_images(scale: Scale, split: str) -> Dataset:
    """Return a split of the scale's images, with the columns `image` (PIL) and `label`.

    Raises:
        UserError: the images have no labels, or a label is not one of the scale's classes.
    """
    dataset = load_images(scale.data, split)
    labels = labels_of(dataset)
    if not (0 <= int(labels.min()) and int(labels.max()) < len(scale.classes)):
        raise UserError(
            f"{scale.data!r} has the labels {int(labels.min())} to {int(labels.max())}, but scale {scale.name} has "
            f"{len(scale.classes)} classes."
        )
    return dataset


def latents_of(scale: Scale, weights: Path | str, folder: Path) -> Dataset:
    """Return the moments of the training images, which the autoencoder in `weights` encodes, and cache them.

    The table is that of `data.latents.cache_latents`, and it is kept in a sub-folder of `folder`.
    """
    with recording() as read:
        autoencoder = load(scale, "vae", weights).to(best_device())
    images = labelled_images(scale, "train")
    # The folder's name has a hash, so that latents of another autoencoder or of other images are never used.
    options: dict[str, Any] = {
        "image_size": scale.image_size,
        "channels": scale.channels,
        "with_mirrored": scale.with_mirrored,
    }
    weights_file = find_model_folder(scale, "vae", weights) / WEIGHTS_FILE
    what = [read[weights_file], provenance.hash_of_dataset(images), options]
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    with PartialState().main_process_first():
        return cache_latents(autoencoder, images, folder / name, **options)


@torch.inference_mode()
def tokens_of(scale: Scale, weights: Path | str) -> Dataset:
    """Return the tokens of the training images, which the VQ autoencoder in `weights` encodes.

    The table has the columns `tokens` (int64 [L] in raster order), `label` and, if the scale has mirrored images,
    `tokens_mirrored`.
    """
    from datasets import Sequence, Value

    tokenizer = VQTokenizer(load(scale, "vq", weights).to(best_device()))
    table = encode_images(
        labelled_images(scale, "train"),
        lambda images: tokenizer.encode(images.to(tokenizer.device)).flatten(1),
        "tokens",
        Sequence(Value("int64")),
        image_size=scale.image_size,
        channels=scale.channels,
        with_mirrored=scale.with_mirrored,
    )
    return table.with_format("torch")


def _some_latents(dataset: Dataset) -> Tensor:
    """Return posterior samples [N, C, h, w] of at most 4,096 images, on which systems measure (`System.measure`).

    Samples are used and not means, because the generator sees a channel that the autoencoder does not use as white
    noise.
    """
    torch.manual_seed(0)
    return sample_posterior(dataset.shuffle(seed=0)[: min(4096, len(dataset))]["moments"])


def _autoencoder_step(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    return autoencoder_loss(model, batch["images"], **options)


def _vq_step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return vq_loss(model, batch["images"])


def _classifier_step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return classifier_loss(model, batch["images"], batch["labels"])


def _latent_step(
    latent_loss: Any, model: Any, batch: dict[str, Tensor], *, scaling: float, with_mirrored: bool, **options: Any
) -> Tensor:
    moments = _half_mirrored(batch, "moments") if with_mirrored else batch["moments"]
    return latent_loss(model, sample_posterior(moments) * scaling, batch["label"], **options)


def _token_step(
    token_loss: Any, model: Any, batch: dict[str, Tensor], *, with_mirrored: bool, **options: Any
) -> Tensor:
    tokens = _half_mirrored(batch, "tokens") if with_mirrored else batch["tokens"]
    return token_loss(model, tokens, batch["label"], **options)


def _half_mirrored(batch: dict[str, Tensor], column: str) -> Tensor:
    """Return a column in which half of the rows, chosen at random, have the value of their mirrored image."""
    values = batch[column]
    mirror = torch.rand(len(values), *[1] * (values.ndim - 1), device=values.device) < 0.5
    return torch.where(mirror, batch[f"{column}_mirrored"], values)


IMAGE_STEPS: dict[str, Callable[..., Tensor]] = {
    "autoencoder": _autoencoder_step,
    "vq": _vq_step,
    "classifier": _classifier_step,
}
"""Losses (on one batch) of the models that are trained on images; generators are trained on latents or tokens."""


def step_of(recipe: Recipe) -> Callable[..., Tensor]:
    """Return the loss of the recipe's model, a function of the model and one batch."""
    if not recipe.is_generator:
        return IMAGE_STEPS[recipe.kind]
    system = SYSTEMS[recipe.kind]
    return functools.partial(_token_step if system.codes else _latent_step, system.loss)


def _autoencoder_scaling(scale: Scale, weights: Path | str) -> float:
    return float(load(scale, "vae", weights).config.scaling_factor)


@torch.inference_mode()
def _measure_scaling(autoencoder: Any, dataset: Dataset) -> float:
    """Return 1 / standard deviation of posterior samples of the training images, of which at most 4,096 are used."""
    torch.manual_seed(0)
    device = next(autoencoder.parameters()).device
    batches = dataset.shuffle(seed=0).select(range(min(4096, len(dataset)))).iter(256)
    latents = [autoencoder.encode(batch["images"].to(device)).latent_dist.sample().cpu() for batch in batches]
    return round(1 / torch.cat(latents).std().item(), 4)
