"""The command's application, and the options that several subcommands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

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
# The choices of the package's own types, spelled out: those load torch, and --help should not take seconds.
DtypeName = Literal["fp32", "bf16", "fp16"]
Randomness = Literal["per-image", "official"]
Labels = Literal["balanced", "random"]
FileFormat = Literal["png", "npz"]
ScaleName = Annotated[str, typer.Argument(help="Which scale: tiny (digits) or small (CIFAR-10).")]
