"""Readers of files that torch.save wrote; pickled code in them is never run."""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenbridge.utils.errors import MissingFileError, UserError
from tokenbridge.weights.official import Layout, State, load_state

CHECKPOINT = "checkpoint-last.pth"


def read_torch_file(path: Path | str) -> Any:
    """Read the tensors and plain values of a file onto the CPU, from a mapped file where possible.

    argparse.Namespace is allowed, because the official checkpoints hold their arguments in one. Restoring it only sets
    attributes and runs no code.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is damaged, not a checkpoint of torch, or holds pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"There is no checkpoint at {path}.")
    size = f"{path.stat().st_size:,} bytes"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except Exception as error:  # torch, zipfile and pickle have many ways to say that bytes are damaged
        if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise UserError(f"{path} holds pickled code, which is never run ({found[1]}).") from error
        raise UserError(f"{path} ({size}) is truncated, damaged or not a checkpoint of torch.") from error


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
    content = read_torch_file(path)
    key = "model_ema" if ema else "model"
    state = content.get(key) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} holds no weights under {key!r}; it has {_describe(content)}.")
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path}: {strange[0]!r} under {key!r} is not a tensor.")
    return _cloned(state)


def read_weights(path: Path | str) -> State:
    """Read the weights of a LlamaGen checkpoint by their official names, onto the CPU.

    The accepted formats are those of sample_c2i_ddp.py. The weights lie under "model" (DDP, and the tokenizers),
    "module" (DeepSpeed) or "state_dict", in this order, or bare (FSDP), for which sample_c2i_ddp.py needs a flag.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is damaged, holds pickled code, or has weights in none of these places.
    """
    content = read_torch_file(path)
    wrappers = ("model", "module", "state_dict")
    state = content
    if isinstance(content, dict):
        state = next((content[key] for key in wrappers if key in content), content)
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        found = _describe(content)
        raise UserError(f"{path} holds no weights, bare or under {', '.join(wrappers)}; it has {found}.")
    return _cloned(state)


def _describe(content: Any) -> str:
    return f"keys {list(content)[:8]}" if isinstance(content, dict) else f"a {type(content).__name__}"


def _cloned(state: State) -> State:
    return {name: value.detach().clone() for name, value in state.items()}  # clones outlive the mapped file
