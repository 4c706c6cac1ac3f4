"""The processes of a launch (torchrun, accelerate): one lock for all of them."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list

from tokenbridge.utils.devices import process_state
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.locks import locked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
        yield
