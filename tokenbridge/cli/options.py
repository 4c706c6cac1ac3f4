"""The command's application, and the options that several subcommands share."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from tokenbridge.configs.schema import Scale


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Check whether the published numbers of TokenBridge and its baselines hold.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
Data = Annotated[
    str | None, typer.Option(help="Images to use instead of the scale's: a folder, Parquet, or a hub name.")
]
ScaleName = Annotated[str, typer.Argument(help="Which scale: tiny (digits) or small (CIFAR-10).")]


def find_scale(name: str, data: str | None = None) -> Scale:
    """Return the scale called `name`, with its images from `data` if that is given.

    Raises:
        ValueError: there is none.
    """
    from tokenbridge.configs.scales import SCALES

    if name not in SCALES:
        raise UserError(f"Unknown scale {name!r}; there are {', '.join(SCALES)}.")
    return SCALES[name] if data is None else replace(SCALES[name], data=data)
