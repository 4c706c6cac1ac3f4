"""Models on disk in diffusers' format: safetensors only, with every weight of the model and no other.

What is loaded is what was hashed: `load_model` reads the bytes of `config.json` and of the weights once, hashes these
bytes and parses them. diffusers' own `from_pretrained` would rather follow an index file, or other files of weights
that lie beside the hashed one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from tokenbridge.utils.errors import MissingFileError, UserError, reading
from tokenbridge.utils.files import replacing_folder
from tokenbridge.utils.hashed import read_hashed
from tokenbridge.weights.official import is_finite, plain_names

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIG_FILE = "config.json"
PIPELINE_FILE = "model_index.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
MODEL_FILES = (WEIGHTS_FILE, CONFIG_FILE)
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf")
LARGEST_SETTING = 2**20  # no number in the configuration of a model is larger, and loops run that often


def load_model(
    model_class: Any,
    folder: Path | str,
    expected: Mapping[str, Any] | None = None,
    *,
    weights_file: str = WEIGHTS_FILE,
) -> Any:
    """Load a diffusers model in float32 and evaluation mode, and record the hashes of its files (`hashed.recording`).

    diffusers alone fills in a missing tensor with random numbers and ignores an unknown one; this function refuses
    both.

    Args:
        model_class: a ModelMixin.
        folder: holds `config.json` and the file of weights; whatever else is in it does not matter.
        expected: settings that the model's configuration must have.
        weights_file: the name of the file of weights.

    Raises:
        MissingFileError: the folder has no weights.
        UserError: a file is damaged, a tensor is missing, unknown, of another shape, no floating-point number, NaN or
            infinite, or the configuration is not the expected one.
    """
    folder, path = Path(folder), Path(folder) / weights_file
    if not path.exists():
        raise MissingFileError(f"There are no weights at {path}.{_what_is_there(folder)}")
    config = read_config(folder, model_class)
    shapes = _shapes_of(path)
    name = f"The {model_class.__name__} in {folder}"
    with reading(folder / CONFIG_FILE, f"the configuration of {model_class.__name__}"):
        sizes = _build(model_class, config, len(shapes), torch.device("meta"))
    _compare({key: list(value.shape) for key, value in sizes.state_dict().items()}, shapes, name)
    for key, value in (expected or {}).items():
        if _plain(sizes.config.get(key)) != _plain(value):
            raise UserError(f"{name} has {key}={sizes.config.get(key)!r}, not {value!r}.")
    check_scale(sizes.config, folder / CONFIG_FILE)
    content = read_hashed(path, limit=path.stat().st_size)
    with reading(path, "a safetensors file"):
        state = plain_names(safetensors.torch.load(content))
    del content
    for key in state:
        # A copy has the alignment of torch's own tensors, on which the rounding of a matrix product may depend.
        state[key] = state[key].to(torch.float32, copy=True)
        if not is_finite(state[key]):
            raise UserError(f"{path}: the weight {key} has numbers that are NaN or infinite.")
    model = _build(model_class, config, len(shapes))
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def read_config(folder: Path | str, model_class: Any = None) -> dict[str, Any]:
    """Read the `config.json` of a model, and record its hash.

    Args:
        model_class: the class that the configuration must be of; None accepts any.

    Raises:
        UserError: the file is missing, damaged, names no class or another one, or holds a number beyond reason.
    """
    path = Path(folder) / CONFIG_FILE
    content = read_hashed(path, limit=2**20)
    with reading(path, "the configuration of a model"):
        config = json.loads(content)
        largest = _largest(config)
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise UserError(f"{path} has no _class_name, so nothing says which model it configures.")
    if model_class is not None and config["_class_name"] != model_class.__name__:
        raise UserError(f"{path} configures a {config['_class_name']}, not a {model_class.__name__}.")
    if not largest <= LARGEST_SETTING:
        raise UserError(f"{path} holds the number {largest:g}, which is more than any setting of a model.")
    return config


def plain_config(model: Any) -> dict[str, Any]:
    """Return the settings of a model as JSON values, without diffusers' own notes."""
    settings = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return dict(json.loads(json.dumps(settings)))


def model_folder(path: Path | None, part: str) -> Path | None:
    """Return the diffusers folder of a model: `path` itself, or its sub-folder `part` if it holds a pipeline.

    None means that `path` is something else, such as a published file or its folder.
    """
    if path is not None and (path / CONFIG_FILE).is_file():
        return path
    return path / part if path is not None and (path / PIPELINE_FILE).is_file() else None


def _build(model_class: Any, config: dict[str, Any], most: int, device: torch.device | None = None) -> Any:
    """Build a model whose weights are on the meta device, and its buffers too if that is `device`.

    Args:
        most: the number of weights in the file. A configuration that asks for more is not built to its end.
    """
    count = 0

    def limit(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > 2 * most + 100:  # a module may register a weight anew, and the error should name what is missing
            raise ValueError(f"it describes more weights than the {most} in the file")

    hook = register_module_parameter_registration_hook(limit)
    try:
        with init_empty_weights() if device is None else device:
            return model_class.from_config(dict(config))
    finally:
        hook.remove()


def _shapes_of(path: Path) -> dict[str, list[int]]:
    """Return the shape of every weight by name, from the header of a safetensors file.

    The safetensors library compares the header with the length of the file, which bounds all that follows.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a regular file.")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a pointer of git-lfs, not the weights; `git lfs pull` fetches them.")
    with reading(path, "a safetensors file"), safetensors.safe_open(path, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  it is no dictionary
        types = {key: part.get_dtype() for key, part in slices.items()}
        shapes = {key: list(part.get_shape()) for key, part in slices.items()}
    if strange := [key for key, kind in types.items() if kind not in ("F64", "F32", "F16", "BF16")]:
        raise UserError(f"{path}: the weight {strange[0]} is of the type {types[strange[0]]}, not floating point.")
    return plain_names(shapes)


def _compare(wanted: Mapping[str, list[int]], found: Mapping[str, list[int]], name: str) -> None:
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    misfits = sorted(
        f"{key} {found[key]} instead of {wanted[key]}"
        for key in wanted.keys() & found.keys()
        if wanted[key] != found[key]
    )
    for words, keys in (("lacks", missing), ("has unknown", unknown), ("misfits", misfits)):
        if keys:
            raise UserError(f"{name} {words} {len(keys)} weights: {keys[:3]}.")


def check_scale(config: Any, where: Path | str) -> None:
    """Check the factors by which an autoencoder scales its latents; a scale of 0 must not be read as none.

    Raises:
        UserError: a factor is not a finite number, or a scale is not above 0.
    """
    scale, shift = (getattr(config, name, None) for name in ("scaling_factor", "shift_factor"))
    for key, value, good in (
        ("scaling_factor", scale, lambda number: math.isfinite(number) and number > 0),
        ("shift_factor", shift, math.isfinite),
    ):
        if value is not None and not (isinstance(value, int | float) and good(value)):
            raise UserError(f"{where}: {key} is {value!r}; it must be a finite number, and a scale above 0.")


def _what_is_there(folder: Path) -> str:
    """Say which other weights a folder holds, and what can be done with them."""
    if not folder.is_dir():
        return f" There is no folder {folder}."
    there = sorted(path.name for path in folder.iterdir() if path.suffix in WEIGHTS_SUFFIXES)
    if not there:
        return ""
    rest = f" and {len(there) - 3} more" if len(there) > 3 else ""
    return (
        f" The folder holds {', '.join(there[:3])}{rest}, which is not read: load it with diffusers and write it with "
        "`save_pretrained(folder, safe_serialization=True, max_shard_size='1TB')`."
    )


def _largest(value: Any) -> float:
    """Return the largest absolute number in a JSON value; NaN if there is one."""
    if isinstance(value, dict | list):
        parts = [_largest(part) for part in (value.values() if isinstance(value, dict) else value)]
        return math.nan if any(math.isnan(part) for part in parts) else max(parts, default=0.0)
    return abs(float(value)) if isinstance(value, int | float) else 0.0


def _plain(value: Any) -> Any:
    """Turn tuples into lists, as JSON does."""
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def save_model(model: Any, folder: Path | str) -> None:
    """Save a model in half precision as safetensors, atomically.

    The weights in memory are rounded to half precision too, so that they equal those on disk.
    """
    with replacing_folder(folder, MODEL_FILES) as temporary:
        nn.Module.half(model).save_pretrained(temporary, safe_serialization=True)
    model.float()
