"""Published files of torch, read without running anything pickled."""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenbridge.utils.errors import MissingFileError, UserError
from tokenbridge.weights.official import Layout, State, WrongStateError, load_official

CHECKPOINT = "checkpoint-last.pth"


def load_checkpoint(path: Path | str, *, ema: bool = True) -> State:
    """Read the weights of an official checkpoint file, by their official names, onto the CPU.

    Only these weights are read into memory: the file is mapped, so that the optimizer's state costs nothing.

    Args:
        path: `checkpoint-last.pth` (model, model_ema, optimizer, epoch, scaler, args) or `kl16.ckpt` (model).
        ema: the moving average of the weights, which the published evaluations used; False takes `model`, the
            only one that `kl16.ckpt` has.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is truncated or no checkpoint, that holds pickled code (never run), or that lacks
            the weights asked for.
    """
    path = Path(path)
    content = read_torch_file(path)
    key = "model_ema" if ema else "model"
    state = content.get(key) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state:
        kind = f"keys {list(content)[:8]}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise UserError(f"{path} holds no weights under {key!r}; it has {kind}.")
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path}: {strange[0]!r} under {key!r} is no tensor.")
    return {name: value.detach().clone() for name, value in state.items()}  # clones outlive the mapped file


def read_torch_file(path: Path) -> Any:
    """Read a file of torch.save: tensors and plain values only.

    argparse.Namespace is let through, since the official checkpoints hold their arguments as one: restoring it
    sets attributes and runs nothing.
    """
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
        raise UserError(f"{path} ({size}) is truncated, damaged or no checkpoint of torch.") from error


def load_from(path: Path | str, module: nn.Module, layout: Layout, *, ema: bool = True) -> None:
    """Put a published checkpoint of MAR's format into `module`, which may be on the meta device.

    Args:
        path: `checkpoint-last.pth` or the folder that holds it, or `kl16.ckpt`.
        module: as created; see `official.load_official`.
        layout: of the module.
        ema: see `load_checkpoint`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `load_checkpoint` and `official.from_official`; the message begins with the path.
    """
    path = Path(path) / CHECKPOINT if Path(path).is_dir() else Path(path)
    load_state(module, load_checkpoint(path, ema=ema), layout, path)


def load_state(module: nn.Module, state: State, layout: Layout, path: Path | str) -> None:
    """Put a state that was read from `path` into `module`, as `official.load_official`; errors begin with the path."""
    try:
        load_official(module, state, layout)
    except WrongStateError as error:
        raise WrongStateError(f"{path}: {error}", error.shapes) from error


def load_weights(path: Path | str) -> State:
    """Read the weights of a LlamaGen checkpoint by their official names, onto the CPU; nothing pickled is run.

    The layouts that sample_c2i_ddp.py accepts: weights under "model" (DDP, and the tokenizers), "module" (DeepSpeed)
    or "state_dict", in this order; or the weights themselves (FSDP), for which it wants a flag.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is damaged, that holds pickled code, or no weights in any of these layouts.
    """
    content = read_torch_file(Path(path))
    wrappers = ("model", "module", "state_dict")
    state = content
    if isinstance(content, dict):
        state = next((content[key] for key in wrappers if key in content), content)
    if not (isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values())):
        kind = f"keys {list(content)[:8]}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise UserError(f"{path} holds no weights, bare or under {', '.join(wrappers)}; it has {kind}.")
    return {name: value.detach().clone() for name, value in state.items()}  # clones outlive the mapped file
