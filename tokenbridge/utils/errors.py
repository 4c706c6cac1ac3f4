"""The errors that a user can mend. Any other exception is a bug of this package.

The command prints a `UserError` as one sentence and exits with 2. It prints any other exception with its traceback and
exits with 3.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class UserError(ValueError):
    """An input, a file or an option is wrong, and the user can mend it; the message says what is wrong and where."""


class MissingFileError(UserError, FileNotFoundError):
    """A required file or folder is missing; the message says where it was looked for."""


class StorageError(UserError, OSError):
    """The disk is full or cannot be written to. Files that were written before the error are kept."""


class DivergedError(UserError, FloatingPointError):
    """The loss of a training became NaN or infinite; its last checkpoint stays."""


class FullDiskError(StorageError):
    """The disk is full. Files that were written before the error are kept."""


class UnusableImageError(UserError, FloatingPointError):
    """A model produced NaN or a black image. Images that were made before the error are kept."""


@contextmanager
def reading(path: Path | str, what: str) -> Iterator[None]:
    """Within the block, turn whatever goes wrong with a foreign file into a `UserError` that names the file.

    Libraries raise anything for a file that somebody damaged or made up: RuntimeError, KeyError, zlib.error,
    AttributeError. A list of them is never complete, so the block should hold the reading alone and no work of ours.

    Args:
        path: the file, for the message.
        what: what it should be, with its article ("an .npz file of statistics").
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"There is no file {path}.") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or "no further reason was given"
        raise UserError(f"{path} cannot be read as {what}: {type(error).__name__}: {reason}") from error
