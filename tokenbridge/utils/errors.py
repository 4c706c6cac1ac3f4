"""The errors that a user can mend. Any other exception is a bug of this package.

The command prints a `UserError` as one sentence and exits with 2. It prints any other exception with its traceback and
exits with 3.
"""

from __future__ import annotations


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
