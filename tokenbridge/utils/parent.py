"""A process that ends with the one that started it, however that one ends."""

from __future__ import annotations

import os
import sys
import threading
import time

PARENT = "TOKENBRIDGE_PARENT"  # the environment variable in which a process tells its children its number
_PERIOD = 1.0  # seconds


def environment_of_child() -> dict[str, str]:
    """Return the environment of a child process of this package that is to end with this process."""
    return {**os.environ, PARENT: str(os.getpid())}


def end_with_parent(parent: int | None = None) -> None:
    """End this process soon after its parent; what it has written stays, and is whole.

    Args:
        parent: the number of the process. None means the one that the environment names, or torchrun, if it started
            this process; the sooner it is asked, the less time there is in which torchrun may be lost unnoticed.
    """
    named = os.environ.pop(PARENT, None)  # it is not for the children of this process
    if parent is None:
        if named is None and "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        parent = os.getppid() if named is None else int(named)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PERIOD)
        leave("Error: The process that started this one has ended, so this one ends too.")

    threading.Thread(target=watch, name="parent", daemon=True).start()


def leave(message: str) -> None:
    """End this process at once, whatever its other threads are waiting for, with a message on stderr."""
    try:
        print(message, file=sys.stderr, flush=True)
    finally:  # even where nobody reads it any more
        os._exit(2)
