"""What the files of this project are checked against."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from tokenbridge.utils.errors import UserError, reading
from tokenbridge.utils.files import read_bytes

if TYPE_CHECKING:
    from pathlib import Path

LARGEST_INTEGER = 2**63  # larger ones do not survive other programs, and those of thousands of digits take long
DEEPEST = 50  # levels of lists and objects; our own files have six


class Strict(BaseModel):
    """A record that refuses unknown fields, NaN and infinity, and does not change."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


def read_json(path: Path | str, what: str) -> Any:
    """Return the contents of a JSON file that somebody else may have made; NaN and infinity are left to the caller.

    What two programs could read as two different things is refused: a byte order mark, a key that occurs twice, an
    integer that does not fit into 64 bits, half of a character.

    Args:
        path: a regular file of at most 64 MiB.
        what: what it should be, with its article ("a file of results").

    Raises:
        MissingFileError: there is no such file.
        UserError: the file cannot be read; the message names it and says why.
    """
    content = read_bytes(path)

    def integer(digits: str) -> int:
        if len(digits) > 20 or abs(int(digits)) >= LARGEST_INTEGER:
            raise UserError(f"{path} holds a whole number of {len(digits)} digits, which is too large for {what}.")
        return int(digits)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise UserError(f"{path} is not {what}: it has the key {twice[:80]!r} twice in one place.")
        return found

    try:
        value = json.loads(content.decode("utf-8"), parse_int=integer, object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON (cut off?): {error}.") from error
    with reading(path, what):
        _check(path, value)
    return value


def _check(path: Path | str, value: Any) -> None:
    """Refuse nesting that recursive programs cannot follow, and text that cannot be written to a file."""
    level = [value]
    for _ in range(DEEPEST):
        found: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                found += [*each.keys(), *each.values()]
            elif isinstance(each, list):
                found += each
            elif isinstance(each, str) and not each.isascii():
                each.encode()
        level = found
        if not level:
            return
    raise UserError(f"{path} is nested more than {DEEPEST} levels deep.")
