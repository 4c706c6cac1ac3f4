"""The command `tokenbridge`: progress on stderr, results on stdout, as a table or with `--json`.

Exit codes: 0 done and, where something is judged, reproduced; 1 not reproduced; 2 could not be done.
"""

from __future__ import annotations

import sys

from rich.console import Console

from tokenbridge.cli import audit, evaluate, reproduce, sample, train, weights  # noqa: F401  they register subcommands
from tokenbridge.cli.options import app
from tokenbridge.utils.files import reference_folder as reference_folder
from tokenbridge.utils.provenance import EnvironmentProblemError, check_environment


def main() -> None:
    """Run the command; every user error is one message on stderr and exit code 2."""
    try:
        check_environment()
        app()
    except (EnvironmentProblemError, ValueError, OSError, FloatingPointError) as error:
        console = Console(stderr=True, soft_wrap=True)
        console.print("[bold red]Error:[/]", end=" ")
        console.print(str(error), highlight=False, markup=False)
        sys.exit(2)
