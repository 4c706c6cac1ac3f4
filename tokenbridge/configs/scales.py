"""The scales by name. Commands, nox sessions, tables and tests read their recipes from here."""

from __future__ import annotations

from dataclasses import replace

from tokenbridge.configs.schema import Scale
from tokenbridge.configs.small import SMALL
from tokenbridge.configs.tiny import TINY
from tokenbridge.utils.errors import UserError

SCALES = {scale.name: scale for scale in (TINY, SMALL)}


def find_scale(name: str, data: str | None = None) -> Scale:
    """Return the scale called `name`; if `data` is given, it replaces the scale's data set.

    Raises:
        UserError: no scale has this name.
    """
    if name not in SCALES:
        raise UserError(f"Unknown scale {name!r}; there are {', '.join(SCALES)}.")
    return SCALES[name] if data is None else replace(SCALES[name], data=data)
