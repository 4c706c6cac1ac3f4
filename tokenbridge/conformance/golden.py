"""Golden files, which hold numeric cases of the official code (format 1 of reference_results/goldens/README.md).

A golden file (`.npz`) holds inputs, outputs, the arguments of the official constructor and a rule that draws the
weights from the official parameter names. This module reads the format. One module for each system (`tokenbridge.py`,
`mar.py`, `llamagen.py`, `givt.py`) computes the outputs, and `judge.py` compares them.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import read_bytes
from tokenbridge.weights.official import Layout, load_official
from tokenbridge.weights.rule import rule_state

FORMAT = 1

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Golden:
    """The contents of a golden file."""

    meta: dict[str, Any]
    inputs: Arrays
    outputs: Arrays

    def tensor(self, name: str) -> Tensor:
        """Return an input as a float32 or int64 tensor."""
        array = self.inputs[name]
        return torch.from_numpy(array.astype(np.float32 if np.issubdtype(array.dtype, np.floating) else np.int64))


@dataclass
class Computed:
    """Our outputs, and what `judge.py` needs besides to judge them."""

    outputs: dict[str, Tensor]
    # By integer output: the distance of each quantised value to the nearest midpoint, near which the token may differ.
    midpoint_distances: dict[str, Tensor] = field(default_factory=dict)
    # By float output: the integer output that it follows from. It is judged only where that one agrees.
    follows: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """An entry of a system: the arrays that its cases must have, the arguments they may have, and what computes them.

    A name that ends in `_*` stands for one array per iteration: `z_*` for z_0, z_1, ... If the names depend on the
    case's arguments, None stands for them, and `run` checks the arrays.
    """

    inputs: frozenset[str] | None
    outputs: frozenset[str] | None
    run: Callable[[Golden], Computed]
    arguments: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()  # inputs that may be absent


Entries = Mapping[str, Mapping[str, Entry | Callable[[Golden], Entry]]]
"""Entries by system and name. If the arrays depend on the case's arguments, a function returns the entry of a case."""


def entry(
    inputs: str, outputs: str, run: Callable[[Golden], Computed], arguments: str = "", optional: str = ""
) -> Entry:
    """Return an entry from names that are separated by spaces."""
    names = [frozenset(text.split()) for text in (inputs, outputs, arguments, optional)]
    return Entry(names[0], names[1], run, names[2], names[3])


MOST_PARAMETERS = 2**30  # the largest published model of which there are cases has 0.94 thousand million
LARGEST = 2**28  # bytes of all arrays of a case; ours have at most 2**18


def read_golden(path: Path | str) -> Golden:
    """Read and check a golden file; pickled code is never run.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is damaged, too large or in another format.
    """
    content = read_bytes(path)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > LARGEST:
            raise UserError(f"Its arrays unfold to {size:,} bytes; a golden case has at most {LARGEST:,}.")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("meta"))) if "meta" in arrays else None
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib, numpy and json have many ways to say that bytes are damaged
        raise UserError(f"The file is damaged or not an .npz file ({type(error).__name__}: {error}).") from error
    if meta is None:
        raise UserError("The file has no 'meta'.")
    if strange := [f"{name} of {array.dtype}" for name, array in arrays.items() if array.dtype.kind not in "biuf"]:
        raise UserError(f"Arrays are real numbers, whole numbers or truth values, not {strange[0]}.")
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        version = meta.get("format") if isinstance(meta, dict) else None
        raise UserError(f"Format version {version!r} is unknown; this runner reads version {FORMAT}.")
    needed = ("system", "entry", "config", "arguments", "weights", "tolerance")
    if absent := [key for key in needed if key not in meta]:
        raise UserError(f"'meta' lacks {', '.join(absent)}.")
    if strange := [name for name in arrays if not name.startswith(("in.", "out."))]:
        raise UserError(f"Unknown array {strange[0]!r}.")
    inputs = {name[3:]: value for name, value in arrays.items() if name.startswith("in.")}
    outputs = {name[4:]: value for name, value in arrays.items() if name.startswith("out.")}
    return Golden(meta, inputs, outputs)


def complete(
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    find_sizes: Callable[[str], Mapping[str, Any]],
    *,
    unused: frozenset[str],
    fixed: Mapping[str, tuple[Any, str]] | None = None,
) -> dict[str, Any]:
    """Complete a case's official keyword arguments by those of its preset, if any, and the constructor's defaults.

    Args:
        given: the case's arguments; lists become tuples.
        defaults: the defaults of the official constructor.
        find_sizes: returns the arguments that the official preset of this name sets.
        unused: arguments that do not change what a case computes; they are dropped.
        fixed: by argument, the only value that our model supports, and the reason.

    Raises:
        UserError: a preset or an argument is unknown, or our model does not support a value.
    """
    check_keys(given, {*defaults, *unused, "preset"})
    sizes = find_sizes(str(given["preset"])) if "preset" in given else {}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    config = {**defaults, **sizes, **{key: value for key, value in values.items() if key in defaults}}
    for key, (only, reason) in (fixed or {}).items():
        if config[key] != only:
            raise UserError(f"{key} {config[key]!r} cannot be run: {reason}.")
    return config


def check_keys(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a configuration with unknown keys."""
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"Unknown configuration keys: {', '.join(unknown)}.")


def choose_preset(presets: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """Return the arguments that the preset of this name sets."""
    if name not in presets:
        raise UserError(f"Unknown preset {name!r}; there are {', '.join(presets)}.")
    return presets[name]


def with_rule_weights(module: Any, layout_of: Callable[[Any], Layout], golden: Golden) -> Any:
    """Load the weights that the case's rule draws into `module`, which may be on the meta device."""
    if (count := sum(parameter.numel() for parameter in module.parameters())) > MOST_PARAMETERS:
        raise UserError(f"The case asks for a model of {count:,} parameters; one has at most {MOST_PARAMETERS:,}.")
    layout = layout_of(module)
    load_official(module, rule_state(layout, golden.meta["weights"]), layout)
    return module
