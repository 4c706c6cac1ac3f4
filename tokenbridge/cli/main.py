"""The command `tokenbridge`: progress on stderr, results on stdout, as a table or with `--json`.

Exit codes: 0 done and, where something is judged, reproduced; 1 not reproduced; 2 the user must mend something, which
one sentence names; 3 a bug of this package, with its traceback.
"""

from __future__ import annotations

import sys
import traceback

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
        # What the operating system says of a path is about the user's files: they can be moved, freed or permitted.
        if isinstance(error, OSError) and error.filename is not None:
            _print_error(f"{error.strerror}: {error.filename}")
            sys.exit(2)
        traceback.print_exc()
        _print_error(f"{type(error).__name__}: {error}. This is a bug of tokenbridge; please report it with the above.")
        sys.exit(3)


def _print_error(message: str) -> None:
    console = Console(stderr=True, soft_wrap=True)
    console.print("[bold red]Error:[/]", end=" ")
    console.print(message, highlight=False, markup=False)
