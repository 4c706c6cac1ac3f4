"""Readers of the published files of Flax, which are .npz or msgpack."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenbridge.utils.errors import MissingFileError, UserError
from tokenbridge.utils.hashed import opened
from tokenbridge.weights.official import Layout, State, load_state


def read_tree(path: Path | str) -> State:
    """Read a tree of arrays onto the CPU, by paths joined with '/'; pickled code is never run.

    - Transformers are published as .npz. A file of parameters alone is read whole. From a file that also holds an
      optimizer's state, only the arrays under `params/` (or `opt/target/`, in older files) are read, as by big_vision's
      `load_params`.
    - The VAE is published as msgpack of Flax, which is read whole. Arrays above 1 GiB, which Flax splits, are not
      joined.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is damaged or in another format, or an array does not hold numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"There is no checkpoint at {path}.")
    try:
        with opened(path) as file:
            arrays = _read_npz(file) if zipfile.is_zipfile(file) else _read_msgpack(file)
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
        sizes = [entry.file_size for entry in file.zip.infolist() if entry.filename.startswith(prefix)]
        if sum(sizes) > 8 * path.stat().st_size + 2**20:  # weights do not compress
            raise ValueError(f"it would unfold to {sum(sizes):,} bytes")
        return {name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)}


def _read_msgpack(path: Path) -> dict[str, NDArray[Any]]:
    """Read a file of flax.serialization: nested maps, whose arrays are extension types of (shape, type, bytes)."""
    import msgpack

    def array(code: int, data: bytes) -> NDArray[Any]:
        if code not in (1, 3):  # 1 is an array, 3 a scalar of numpy
            raise UserError(f"extension {code}")
        shape, dtype, content = msgpack.unpackb(data)
        return np.frombuffer(content, "V2" if dtype == "bfloat16" else dtype).reshape(shape)

    def flat(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, NDArray[Any]]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}/")
            else:
                yield prefix + name, np.asarray(value)

    # msgpack needs no limits here: the file is on this disk, and no number in it makes msgpack reserve more memory than
    # the file has bytes.
    tree = msgpack.unpackb(path.read_bytes(), ext_hook=array)
    if not isinstance(tree, dict):
        raise UserError(f"a {type(tree).__name__}")
    return dict(flat(tree, ""))


def _tensor(where: str, array: NDArray[Any]) -> Tensor:
    """Convert an array to a tensor. numpy has no bfloat16 and holds it as two bytes without a type."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return _tensor(where, array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "fiu":
        raise UserError(f"{where} has the type {array.dtype}, which is not a number.")
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def load_tree(module: nn.Module, tree: Mapping[str, Tensor], layout: Layout, path: Path | str) -> None:
    """Load a tree that was read from `path` into `module`, which may be on the meta device.

    Half precision is widened to float32. Integers are refused.

    Raises:
        UserError: the tensors do not fit the module; the message begins with the path.
    """
    load_state(module, {name: x.float() if x.is_floating_point() else x for name, x in tree.items()}, layout, path)
