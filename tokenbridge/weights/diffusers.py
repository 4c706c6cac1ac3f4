"""Models on disk: diffusers' format, safetensors only, nothing missing and nothing left over."""

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
    """Load a diffusers model, float32, in evaluation mode.

    Args:
        model_class: a ModelMixin.
        folder: with `config.json` and `diffusion_pytorch_model.safetensors`.
        expected: settings that its configuration must have.

    Raises:
        FileNotFoundError: the weights are not there.
        ValueError: they are cut off, lack a tensor, have one too many or of another shape (diffusers alone would go on
            with random numbers), or belong to a model of other settings.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise MissingFileError(f"There are no weights at {folder / WEIGHTS_FILE}.")
    try:
        model, info = model_class.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # cut off, of another shape: each raises a type of its own
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
    """Return tuples as lists, which is what JSON makes of them."""
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def save_model(model: Any, folder: Path | str) -> None:
    """Save a model in half precision as safetensors; the folder's files appear whole or not at all.

    The model in memory is rounded likewise, so that it is the one on disk.
    """
    with replacing_folder(folder) as temporary:
        nn.Module.half(model).save_pretrained(temporary, safe_serialization=True)
    model.float()


def check_replaceable(folder: Path | str, index: str) -> None:
    """Refuse to replace a folder that holds something else: one that has files, but not the file `index`."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / index).is_file())):
        raise UserError(f"{folder} is there and has no {index}; it is left as it is.")
