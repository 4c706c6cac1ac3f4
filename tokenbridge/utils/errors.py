"""Errors that the user can mend; anything else that is raised is a bug of this package.

The command prints a `UserError` as one sentence and exits with 2. It prints any other exception with its traceback and
exits with 3.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something is wrong that the user can mend; the message is one sentence that says what and where."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that is needed is missing; the message says where it was looked for."""


class StorageError(UserError, OSError):
    """The disk refuses to write, or is full; what was written before stays."""


class UnusableImageError(UserError, FloatingPointError):
    """A model made an image that is NaN or black; what was made before stays."""
