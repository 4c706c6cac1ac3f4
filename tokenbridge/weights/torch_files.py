"""Readers of files that torch.save wrote; pickled code in them is never run."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenbridge.utils.errors import MissingFileError, UserError
from tokenbridge.utils.hashed import opened
from tokenbridge.weights.official import Layout, State, load_state, plain_names

CHECKPOINT = "checkpoint-last.pth"


def read_state(path: Path | str, select: Callable[[Any], Any]) -> State:
    """Read tensors by name from a file of torch.save onto the CPU, and record its hash (`hashed.recording`).

    argparse.Namespace is allowed, because the official checkpoints hold their arguments in one. Restoring it only sets
    attributes and runs no code. The file is mapped where possible, so that only the selected tensors take memory.

    Args:
        select: takes the content of the file and returns the state. It raises a UserError whose text goes on after the
            path of the file.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is damaged, not a checkpoint of torch, or holds pickled code, or tensors without numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"There is no checkpoint at {path}.")
    size = path.stat().st_size
    with opened(path) as file:
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                try:
                    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError as error:
                    if "mmap can only be used" not in str(error):
                        raise
                    content = torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6
            return _own(select(content), size)
        except UserError as error:
            raise UserError(f"{path}{error}") from error
        except Exception as error:  # torch, zipfile and pickle have many ways to say that bytes are damaged
            if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL ([\w.]+)", str(error))):
                raise UserError(
                    f"{path} holds pickled code, which is never run ({found[1]}). If you trust the file, load it "
                    "elsewhere and save its tensors alone."
                ) from error
            raise UserError(f"{path} ({size:,} bytes) is truncated, damaged or not a checkpoint of torch.") from error


def _own(state: Any, size: int) -> State:
    """Copy the tensors of a state, so that they outlive the mapped file of `size` bytes.

    A tensor may claim more numbers than are stored (with strides of 0), so sizes are compared before anything is
    copied.
    """
    if not (isinstance(state, dict) and state):
        raise UserError(f" holds {_describe(state)} and no tensors by name.")
    total = 0
    for name, value in state.items():
        if not isinstance(name, str):
            raise UserError(f": the tensor {name!r} has no name.")
        if not isinstance(value, Tensor):
            raise UserError(f": {name!r} is not a tensor.")
        if value.is_meta or value.layout != torch.strided:
            raise UserError(f": {name!r} is a tensor without plain numbers.")
        length = value.numel() * value.element_size()
        total += length
        if length > value.untyped_storage().nbytes() or total > 2 * size:
            raise UserError(f": {name!r} {list(value.shape)} claims more numbers than the file holds.")
    return plain_names({name: value.detach().clone() for name, value in state.items()})


def load_checkpoint(module: nn.Module, path: Path | str, layout: Layout, *, ema: bool = True) -> None:
    """Load a published checkpoint in the format of TokenBridge and MAR into a module, which may be on the meta device.

    Args:
        path: `checkpoint-last.pth` or the folder that holds it, or `kl16.ckpt`.
        ema: see `read_checkpoint`.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is damaged, or its tensors do not fit the module; the message begins with the path.
    """
    path = Path(path) / CHECKPOINT if Path(path).is_dir() else Path(path)
    load_state(module, read_checkpoint(path, ema=ema), layout, path)


def read_checkpoint(path: Path | str, *, ema: bool = True) -> State:
    """Read the weights of a checkpoint of TokenBridge or MAR by their official names, onto the CPU.

    Only these weights are read into memory. The file is mapped, so that the optimizer's state costs nothing.

    Args:
        path: `checkpoint-last.pth` (model, model_ema, optimizer, epoch, scaler, args) or `kl16.ckpt` (model).
        ema: whether to read the moving average of the weights (`model_ema`), which the published evaluations used,
            instead of `model`, which is all that `kl16.ckpt` has.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is truncated, is not a checkpoint, holds pickled code, or lacks the requested weights.
    """
    key = "model_ema" if ema else "model"

    def select(content: Any) -> Any:
        state = content.get(key) if isinstance(content, dict) else None
        if isinstance(state, dict) and state:
            if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
                raise UserError(f": {strange[0]!r} under {key!r} is not a tensor.")
            return state
        if state:
            raise UserError(f" holds a {type(state).__name__} under {key!r}, and no tensors by name.{_other_way()}")
        hint = _other_way() if isinstance(content, dict) and ema and isinstance(content.get("model"), dict) else ""
        raise UserError(f" holds no weights under {key!r}; it has {_describe(content)}.{hint}")

    return read_state(path, select)


def _other_way() -> str:
    return " To take the last weights under 'model' instead, convert the file with --no-ema."


def read_weights(path: Path | str) -> State:
    """Read the weights of a LlamaGen checkpoint by their official names, onto the CPU.

    The accepted formats are those of sample_c2i_ddp.py. The weights lie under "model" (DDP, and the tokenizers),
    "module" (DeepSpeed) or "state_dict", in this order, or bare (FSDP), for which sample_c2i_ddp.py needs a flag.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is damaged, holds pickled code, or has weights in none of these places.
    """
    wrappers = ("model", "module", "state_dict")

    def select(content: Any) -> Any:
        state = content
        if isinstance(content, dict):
            state = next((content[key] for key in wrappers if key in content), content)
        if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
            raise UserError(f" holds no weights, bare or under {', '.join(wrappers)}; it has {_describe(content)}.")
        return state

    return read_state(path, select)


def _describe(content: Any) -> str:
    return f"keys {list(content)[:8]}" if isinstance(content, dict) else f"a {type(content).__name__}"
