"""The scales by name. Commands, nox sessions, tables and tests read their recipes from here."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

from tokenbridge.configs.schema import TRAINING_LOG, Scale
from tokenbridge.configs.small import SMALL
from tokenbridge.configs.tiny import TINY
from tokenbridge.utils import files
from tokenbridge.utils.console import log
from tokenbridge.utils.errors import UserError, reading
from tokenbridge.weights.diffusers import WEIGHTS_FILE

SCALES = {scale.name: scale for scale in (TINY, SMALL)}


def find_scale(name: str, data: str | None = None) -> Scale:
    """Return the scale called `name`; if `data` is given, it replaces the scale's data set.

    Raises:
        UserError: no scale has this name.
    """
    if name not in SCALES:
        raise UserError(f"Unknown scale {name!r}; there are {', '.join(SCALES)}.")
    return SCALES[name] if data is None else replace(SCALES[name], data=data)


def has_other_images(scale: Scale) -> bool:
    """Return whether the scale's data set was replaced by the user's."""
    return scale.name in SCALES and scale.data != SCALES[scale.name].data


def find_model_folder(scale: Scale, name: str, weights: Path | str) -> Path:
    """Return the folder of a model, which is `weights/name`, or that of the shipped model.

    A generator must be in `weights`. The tokenizers and the classifier, on which generators and scores rest, are the
    shipped ones where `weights` has none: so one generator can be trained and measured without training all others.
    They are shipped for the scale's own images only.
    """
    folder, shipped = Path(weights) / name, files.reference_folder() / scale.name / "weights" / name
    if (folder / WEIGHTS_FILE).exists() or not (shipped / WEIGHTS_FILE).is_file():
        return folder
    if scale.recipe(name).is_generator or has_other_images(scale):
        return folder
    _say_that_it_is_shipped(name, folder)
    return shipped


def is_shipped(scale: Scale, name: str, weights: Path | str) -> bool:
    """Return whether `find_model_folder` is that of the shipped model in the place of one that `weights` lacks."""
    return find_model_folder(scale, name, weights) != Path(weights) / name


def check_tokenizer(name: str, weights: Path | str, tokenizer: Path) -> None:
    """Check that a generator that was trained here was trained on this tokenizer; another one decodes nonsense.

    Args:
        name: the generator.
        weights: the folder of models, which `train` calls `weights`; the generator's log is beside it.
        tokenizer: the folder of the tokenizer.

    Raises:
        UserError: it was trained on another one, or its log is damaged.
    """
    log = Path(weights).parent / name / TRAINING_LOG
    file = tokenizer / WEIGHTS_FILE
    if Path(weights).name != "weights" or not log.is_file() or not file.is_file():
        return
    with reading(log, "the log of a training"):
        trained_on = json.loads(files.read_bytes(log)).get("tokenizer")  # logs of earlier versions do not say
        what, sha256 = (trained_on["name"], trained_on["sha256"]) if trained_on else ("", None)
    if sha256 is not None and sha256 != files.sha256_of(file):
        raise UserError(
            f"The {name} in {weights} was trained on another {what} than the one in {tokenizer}, which "
            f"would decode its images wrongly. Put its own there, or train {name} again."
        )


@functools.cache  # once
def _say_that_it_is_shipped(name: str, absent: Path) -> None:
    log(f"The shipped {name} is used, because there is none at {absent}.")
