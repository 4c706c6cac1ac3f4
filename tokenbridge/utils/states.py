"""States on the disk: values and tensors that this package saves and reads again, with a hash by which they are whole.

Torch's own files notice neither a flipped byte nor a changed field.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenbridge.utils.errors import UserError, reading
from tokenbridge.utils.files import replacing


def save_state(path: Path | str, state: dict[str, Any]) -> None:
    """Save plain values and tensors, atomically, with their hash as the field `sha256`."""
    with replacing(path) as temporary:
        torch.save({**state, "sha256": _hash_of(state)}, temporary)


def read_state(path: Path | str, what: str, remedy: str) -> dict[str, Any]:
    """Read what `save_state` wrote, onto the CPU; pickled code is never run.

    Args:
        what: what it is, with its article, for the message.
        remedy: a sentence that says what to do with a damaged one.

    Raises:
        UserError: the file is not one of `save_state`, or anything in it was changed or lost since.
    """
    path = Path(path)
    if not path.is_file():  # a pipe never ends
        raise UserError(f"{path} is not {what}, because it is no regular file. {remedy}")
    try:
        with reading(path, what):
            with zipfile.ZipFile(path) as archive:
                unfolded = sum(entry.file_size for entry in archive.infolist())
            if unfolded > path.stat().st_size:  # torch does not compress
                raise UserError(f"{path} is not {what}, because it unfolds to {unfolded:,} bytes.")
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state.pop("sha256") != _hash_of(state):
                raise UserError(f"{path} is not {what} as it was written, because its content does not have its hash.")
            return dict(state)
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')}. {remedy}") from error


def _hash_of(state: Any) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor claims more values than it has")
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict | list | tuple):
            digest.update(f"{len(value)} in {'{' if isinstance(value, dict) else '['}".encode())
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        else:
            digest.update(f"{value!r} ".encode())

    add(state)
    return digest.hexdigest()
