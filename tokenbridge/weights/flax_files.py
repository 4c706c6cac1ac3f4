"""Published files of Flax: .npz and msgpack."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenbridge.utils.errors import MissingFileError, UserError
from tokenbridge.weights.official import Layout, State, WrongStateError, load_official

SCANNED = "decoder/EncDecBlock/"
UNROLLED = re.compile(r"decoder/EncDecBlock(\d+)/(.+)")


def unroll(tree: Mapping[str, Tensor]) -> State:
    """Split scanned blocks (axis 1) into one array a block; an unrolled tree stays as it is.

    Raises:
        ValueError: a scanned array without that axis, or blocks that are there both ways.
    """
    state: State = {}
    for name, value in tree.items():
        if not name.startswith(SCANNED):
            layers = {name: value}
        elif value.ndim < 2:
            raise UserError(f"{name} {list(value.shape)} has no axis 1, along which blocks are stacked.")
        else:
            rest = name.removeprefix(SCANNED)
            layers = {f"decoder/EncDecBlock{i}/{rest}": layer for i, layer in enumerate(value.unbind(1))}
        if (twice := next((layer for layer in layers if layer in state), None)) is not None:
            raise UserError(f"{twice} is there twice, scanned and unrolled.")
        state |= layers
    return state


def scan(tree: Mapping[str, Tensor]) -> State:
    """Stack the blocks of an unrolled tree along axis 1; the inverse of `unroll`."""
    state: State = {}
    blocks: dict[str, dict[int, Tensor]] = {}
    for name, value in tree.items():
        if match := UNROLLED.fullmatch(name):
            blocks.setdefault(SCANNED + match[2], {})[int(match[1])] = value
        else:
            state[name] = value
    return state | {name: torch.stack([layers[i] for i in range(len(layers))], 1) for name, layers in blocks.items()}


def load_tree(path: Path | str) -> State:
    """Read a tree of arrays, by '/'-joined path, onto the CPU; nothing pickled is run.

    - .npz (the transformer). A file of parameters alone is taken whole; of one with an optimizer's state only what
      is under `params/` (or `opt/target/`, the older way) is read, as big_vision's `load_params` does.
    - Flax's msgpack (the VAE), taken whole. Arrays above 1 GiB, which Flax splits, are not put together.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is damaged or neither of these, or arrays that are no numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"There is no checkpoint at {path}.")
    try:
        arrays = _read_npz(path) if zipfile.is_zipfile(path) else _read_msgpack(path)
    except ImportError:
        raise
    except Exception as error:  # zipfile, zlib, numpy and msgpack have many ways to say that bytes are damaged
        size = f"{path.stat().st_size:,} bytes"
        raise UserError(f"{path} ({size}) is damaged, or neither .npz nor msgpack of arrays ({error}).") from error
    return {name: _tensor(f"{path}: {name}", array) for name, array in arrays.items()}


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        prefixes = (p for p in ("params/", "opt/target/") if any(name.startswith(p) for name in file.files))
        prefix = next(prefixes, "")
        return {name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)}


def _read_msgpack(path: Path) -> dict[str, NDArray[Any]]:
    """Read a file of flax.serialization: nested maps, whose arrays are extensions of (shape, type, bytes)."""
    import msgpack

    def array(code: int, data: bytes) -> NDArray[Any]:
        if code not in (1, 3):  # an array, or a scalar of numpy
            raise UserError(f"extension {code}")
        shape, dtype, content = msgpack.unpackb(data)
        return np.frombuffer(content, "V2" if dtype == "bfloat16" else dtype).reshape(shape)

    def flat(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, NDArray[Any]]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}/")
            else:
                yield prefix + name, np.asarray(value)

    # No limits: the file is on this disk, and no number in it makes msgpack reserve more than it holds.
    tree = msgpack.unpackb(path.read_bytes(), ext_hook=array)
    if not isinstance(tree, dict):
        raise UserError(f"a {type(tree).__name__}")
    return dict(flat(tree, ""))


def _tensor(where: str, array: NDArray[Any]) -> Tensor:
    """Return an array as a tensor; numpy knows bfloat16 as two bytes without a type."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return _tensor(where, array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "fiu":
        raise UserError(f"{where} has the type {array.dtype}, which is no number.")
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def load_into(module: nn.Module, tree: Mapping[str, Tensor], layout: Layout, path: Path | str) -> None:
    """Put a parameter tree, scanned or unrolled, into `module`; `path` is where it was read, for the message.

    Raises:
        ValueError: as `unroll` and `official.from_official`; the message begins with the path.
    """
    try:
        state = unroll(tree)
        # Half precision is widened; integers stay, and are refused.
        state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
        load_official(module, state, layout)
    except WrongStateError as error:
        raise WrongStateError(f"{path}: {error}", error.shapes) from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
