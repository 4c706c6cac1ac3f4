"""The processes of a launch (torchrun, accelerate): one lock for all of them, and an end for all if one is lost."""

from __future__ import annotations

import atexit
import os
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from tokenbridge.utils.errors import UserError
from tokenbridge.utils.locks import locked
from tokenbridge.utils.parent import end_with_parent, leave

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MEETING = timedelta(seconds=30)  # within which all processes of a launch must have come; torch tries twice
SILENCE = 30.0  # seconds after which a process that gives no sign of life is taken for lost
_PERIOD = 2.0  # seconds between two signs of life
_failed = threading.Event()


def process_state() -> PartialState:
    """Return accelerate's state of this process: its device, its rank and the number of processes.

    The number of processes is 1 unless torchrun or accelerate launched the run. Of several, each ends within a minute
    if another one, or the launcher, is lost.
    """
    first = not PartialState._shared_state
    if first and "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this process
        end_with_parent(os.getppid())
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=MEETING)
    if first and state.num_processes > 1:
        from torch.distributed import distributed_c10d as c10d

        # Later, processes wait for one another only at the start and the end of a run, as long as the slowest takes.
        set_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout  # the name before torch 2.12
        set_timeout(timedelta(days=1))
        _watch_others(c10d._get_default_store(), state.process_index, state.num_processes)
    return state


def _watch_others(store: Any, rank: int, num_processes: int) -> None:
    """Give signs of life to the other processes, and end this one if another one gives none."""
    store = store.clone() if hasattr(store, "clone") else store  # calls of this one must not wait for those of others
    signs = {other: b"" for other in range(num_processes) if other != rank}
    seen = dict.fromkeys(signs, time.monotonic())
    ended: set[int] = set()
    ending = threading.Event()

    def give_and_take() -> None:
        with suppress(Exception):  # the process that keeps the store is lost, or has ended: no more signs come
            while not ending.is_set():
                store.set(f"tokenbridge/alive/{rank}", str(time.monotonic()))
                for other in signs:
                    if store.check([f"tokenbridge/ended/{other}"]):
                        ended.add(other)
                    key = f"tokenbridge/alive/{other}"
                    if store.check([key]) and (sign := store.get(key)) != signs[other]:
                        signs[other], seen[other] = sign, time.monotonic()
                ending.wait(_PERIOD)

    def watch() -> None:
        before = time.monotonic()
        while not ending.wait(_PERIOD):
            if time.monotonic() - before > SILENCE / 2:  # this process was stopped for a while, and heard no signs
                seen.update(dict.fromkeys(seen, time.monotonic()))
            before = time.monotonic()
            for other, last in seen.items():
                if other not in ended and time.monotonic() - last > SILENCE:
                    leave(
                        f"Error: Process {other} of this run is lost, so process {rank} ends too. What is finished is "
                        "kept: the same command makes the rest."
                    )

    threads = [threading.Thread(target=target, daemon=True) for target in (give_and_take, watch)]

    def end() -> None:
        ending.set()
        threads[0].join(timeout=10)  # a thread within the store would not survive the end of the interpreter
        if _failed.is_set():  # the others are not to wait for this process
            return
        with suppress(Exception):  # perhaps nobody is left to be told
            store.set(f"tokenbridge/ended/{rank}", "1")

    atexit.register(end)
    for thread in threads:
        thread.start()


@contextmanager
def locked_by_launch(folder: Path | str) -> Iterator[None]:
    """Hold the lock of a folder for all processes of a launch, each of which calls this function.

    Raises:
        FolderInUseError: another launch has the lock; every process raises it.
    """
    refused: list[UserError | None] = [None]
    with ExitStack() as stack:
        if process_state().is_main_process:
            try:
                stack.enter_context(locked(folder))
            except UserError as error:
                refused = [error]
        if (refusal := broadcast_object_list(refused)[0]) is not None:
            raise refusal
        try:
            yield
        except BaseException:
            _failed.set()
            raise
