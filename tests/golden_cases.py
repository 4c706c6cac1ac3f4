"""Golden cases, read, changed and judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenbridge.conformance import judge as c
from tokenbridge.utils.files import reference_folder

Arrays = dict[str, NDArray[Any]]


def golden(name: str) -> Path:
    return reference_folder() / "goldens" / f"{name}.npz"


def listed_goldens(prefix: str = "") -> dict[str, str]:
    """Return the SHA-256 of the official code's cases by file name, as they are listed beside them."""
    lines = (reference_folder() / "goldens" / "SHA256SUMS").read_text().splitlines()
    return {name: sha256 for sha256, name in map(str.split, lines) if name.startswith(prefix)}


def changed(name: str, folder: Path, change: Callable[[dict[str, Any], Arrays], Any]) -> Path:
    """Write a copy of a golden file after `change(meta, arrays)`."""
    with np.load(golden(name)) as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    change(meta, arrays)
    path = folder / "changed.npz"
    np.savez(path, meta=np.array(json.dumps(meta)), **arrays)
    return path


def only_failure(path: Path) -> str:
    """Return the reason of a file that could not be run."""
    (outcome,) = c.run_file(path)
    assert (outcome.name, outcome.verdict, outcome.error) == ("file", "fail", None)
    return outcome.reason


def failed(outcomes: list[c.Outcome]) -> set[str]:
    return {outcome.name for outcome in outcomes if outcome.verdict == "fail"}


def set_meta(*keys: str, to: Any) -> Callable[[dict[str, Any], Arrays], None]:
    def change(meta: dict[str, Any], arrays: Arrays) -> None:
        for key in keys[:-1]:
            meta = meta[key]
        meta[keys[-1]] = to

    return change
