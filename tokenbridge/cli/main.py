"""The command `tokenbridge`: progress on stderr, results on stdout, as a table or with `--json`.

Exit codes: 0 done and, where something is judged, reproduced; 1 not reproduced; 2 the user must mend something, which
one sentence names; 3 a bug of this package, with its traceback; 130 interrupted.
"""

from __future__ import annotations

import atexit
import errno
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any


def main() -> None:
    """Run the command; see above for the exit codes."""
    interrupts: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a shell may have told a process in the background to ignore it
        signal.signal(signal.SIGINT, interrupt)
    code = 0
    try:
        # Imported here, because ^C is also pressed in the seconds that it takes.
        from tokenbridge.utils.console import lasting_streams
        from tokenbridge.utils.parent import end_with_parent

        end_with_parent()

        with lasting_streams():
            code = _run(interrupts)
    except KeyboardInterrupt:
        interrupts.append(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ends what is left without a word
    if interrupts:
        code = 130
        if sys.stderr is not None:
            print("Interrupted.", file=sys.stderr)
    sys.exit(code)


def _run(interrupts: Sequence[int]) -> int:
    """Run the subcommand, print what went wrong, and return the exit code.

    Args:
        interrupts: the signals that have come. Libraries turn an interrupt of their import into an error of theirs.
    """
    from tokenbridge.utils.console import log, print_error
    from tokenbridge.utils.errors import UserError

    try:
        try:
            _call_subcommand()
        finally:
            sys.stdout.flush()  # a full disk shows here, and is an error like any other
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except Exception as error:
        if interrupts:
            return 130
        if isinstance(error, UserError):
            print_error(str(error))
            return 2
        if hasattr(error, "exit_code"):  # of typer: words that do not fit, or --help
            if (sentence := _usage(error)) is not None:
                print_error(sentence)
            return int(error.exit_code)
        if (sentence := _environment_problem(error)) is not None:
            print_error(sentence)
            return 2
        log(traceback.format_exc().rstrip())
        message = f"{type(error).__name__}: {_one_line(error)}"
        print_error(f"{message}. This is a bug of tokenbridge; please report it with the above.")
        return 3
    return 0


def _call_subcommand() -> None:
    """Parse the words of the command line and call the subcommand, which may raise SystemExit.

    typer's own way of doing this ends with 1 for an EOFError and for a pipe that nobody reads.
    """
    import typer

    from tokenbridge.cli import audit, evaluate, reproduce, sample, train, weights  # noqa: F401  they register subcommands
    from tokenbridge.cli.options import app
    from tokenbridge.utils.errors import UserError
    from tokenbridge.utils.provenance import check_environment

    if any(word == "" or (word.startswith("--") and word.endswith("=")) for word in sys.argv[1:]):
        raise UserError("A word of the command line is empty; perhaps a variable of the shell is not set.")
    check_environment()
    command = typer.main.get_command(app)
    with command.make_context("tokenbridge", sys.argv[1:]) as context:
        command.invoke(context)


def _usage(error: Exception) -> str | None:
    """Return what is wrong with the words of the command line; None if typer has printed help instead."""
    if not hasattr(error, "format_message") or type(error).__name__ == "NoArgsIsHelpError":
        return None
    sentence = _sentence(error.format_message().replace("Value error, ", ""))
    context = getattr(error, "ctx", None)
    return sentence if context is None else f"{sentence} See `{context.command_path} --help`."


def _environment_problem(error: Exception) -> str | None:
    """Return what is wrong with the user's machine or files, which no line of this package can foresee; None if not."""
    import PIL

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "There is no space left on the disk."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, PIL.UnidentifiedImageError):  # names the file in its message
        return f"An image is damaged: {error}."
    if type(error).__name__ in ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError") or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    ):
        return (
            "Another process of this run has ended, or did not come. What is finished is kept: run all of them again."
        )
    # torch has a class of its own for a GPU, and a RuntimeError for main memory.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return f"There is not enough memory; a smaller batch takes less. ({_one_line(error)})"
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _sentence(text: str) -> str:
    """Return text on one line, with a full stop."""
    line = " ".join(text.split())
    return line if line.endswith((".", "?")) else f"{line}."
