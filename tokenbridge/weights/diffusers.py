"""Models on disk in diffusers' format: safetensors only, with every weight of the model and no other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tokenbridge.utils.errors import MissingFileError, UserError
from tokenbridge.utils.files import replacing_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def load_model(model_class: Any, folder: Path | str, expected: Mapping[str, Any] | None = None) -> Any:
    """Load a diffusers model in float32 and evaluation mode.

    diffusers alone fills in a missing tensor with random numbers and ignores an unknown one; this function refuses
    both.

    Args:
        model_class: a ModelMixin.
        folder: holds `config.json` and `diffusion_pytorch_model.safetensors`.
        expected: settings that the model's configuration must have.

    Raises:
        MissingFileError: the folder has no weights.
        UserError: the file is cut off, a tensor is missing, unknown or of another shape, or the configuration is not
            the expected one.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise MissingFileError(f"There are no weights at {folder / WEIGHTS_FILE}.")
    try:
        model, info = model_class.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # each kind of damage raises an exception of its own type
        raise UserError(
            f"The {model_class.__name__} in {folder} does not load; it needs a whole {WEIGHTS_FILE} and its "
            f"config.json: {type(error).__name__}: {error}"
        ) from error
    for what, words in (("missing_keys", "lacks"), ("unexpected_keys", "has unknown"), ("mismatched_keys", "misfits")):
        if found := sorted(str(key) for key in info[what]):
            raise UserError(f"The {model_class.__name__} in {folder} {words} {len(found)} weights: {found[:3]}.")
    for key, value in (expected or {}).items():
        if _plain(model.config[key]) != _plain(value):
            raise UserError(f"The {model_class.__name__} in {folder} has {key}={model.config[key]!r}, not {value!r}.")
    return model.eval()


def _plain(value: Any) -> Any:
    """Turn tuples into lists, as JSON does."""
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def save_model(model: Any, folder: Path | str) -> None:
    """Save a model in half precision as safetensors, atomically.

    The weights in memory are rounded to half precision too, so that they equal those on disk.
    """
    with replacing_folder(folder) as temporary:
        nn.Module.half(model).save_pretrained(temporary, safe_serialization=True)
    model.float()


def check_replaceable(folder: Path | str, index: str) -> None:
    """Check that a converted model may be written to `folder`: it is absent, empty, or holds another such model.

    Args:
        index: a file that every such folder holds.

    Raises:
        UserError: the folder holds something else, which must not be lost.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / index).is_file())):
        raise UserError(f"{folder} is not replaced, because it exists and has no {index}.")
