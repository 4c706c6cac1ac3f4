"""The command `tokenbridge`: progress on stderr, results on stdout, as a table or with `--json`.

Exit codes: 0 done and, where something is judged, reproduced; 1 not reproduced; 2 the user must mend something, which
one sentence names; 3 a bug of this package, with its traceback; 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
import traceback

import PIL
from rich.console import Console

from tokenbridge.cli import audit, evaluate, reproduce, sample, train, weights  # noqa: F401  they register subcommands
from tokenbridge.cli.options import app
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.provenance import check_environment


def main() -> None:
    """Run the command; see above for the exit codes."""
    try:
        check_environment()
        app()
    except UserError as error:
        _print_error(str(error))
        sys.exit(2)
    except Exception as error:
        if (sentence := _environment_problem(error)) is not None:
            _print_error(sentence)
            sys.exit(2)
        traceback.print_exc()
        message = f"{type(error).__name__}: {_one_line(error)}"
        _print_error(f"{message}. This is a bug of tokenbridge; please report it with the above.")
        sys.exit(3)


def _environment_problem(error: Exception) -> str | None:
    """Return what is wrong with the user's machine or files, which no line of this package can foresee; None if not."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "There is no space left on the disk."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, PIL.UnidentifiedImageError):  # names the file in its message
        return f"An image is damaged: {error}."
    # torch has a class of its own for a GPU, and a RuntimeError for main memory.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return f"There is not enough memory; a smaller batch takes less. ({_one_line(error)})"
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _print_error(message: str) -> None:
    console = Console(stderr=True, soft_wrap=True)
    console.print("[bold red]Error:[/]", end=" ")
    console.print(message, highlight=False, markup=False)
