"""The command's application, and the options that several subcommands share."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from tokenbridge.utils.errors import UserError

SETTINGS = "tokenbridge.settings"  # where a command keeps them in its context
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Check whether the published numbers of TokenBridge and its baselines hold.",
)

# Bounds of numbers, so that no library meets one that it cannot count with.
MAX_SEED = 2**32 - 1  # of numpy's RandomState, which torch-fidelity uses
MAX_IMAGES = 10**7
MAX_BATCH = 10**6
MAX_RESAMPLES = 10**6
MAX_JOBS = 1024

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]


def _stop_downloads(wanted: bool) -> None:
    """Stop all downloads, of this process and of those that it starts."""
    if wanted:
        from huggingface_hub import constants

        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True


Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        callback=_stop_downloads,
        expose_value=False,
        help="Download nothing that is missing (HF_HUB_OFFLINE=1).",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(help="Images in the place of the scale's: a folder with train/ and test/, or a name on the hub."),
]
# The choices of the package's own types, spelled out: those load torch, and --help should not take seconds.
DtypeName = Literal["fp32", "bf16", "fp16"]
Randomness = Literal["per-image", "official"]
Labels = Literal["balanced", "random"]
FileFormat = Literal["png", "npz"]
Quantizer = Literal["gaussian", "uniform", "lloyd-max"]
ScaleName = Annotated[str, typer.Argument(help="The scale: tiny (digits) or small (CIFAR-10).")]


def not_one(resamples: int | None) -> int | None:
    """Refuse one resample, which has no interval."""
    if resamples == 1:
        raise typer.BadParameter("An interval needs at least 2 resamples, and 0 leaves it out")
    return resamples


class SettingsCommand(TyperCommand):
    """A command whose unknown options are settings of the model it is about, wherever they stand among the words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the settings out, for `settings_of`, and parse the rest as usual."""
        options: list[Any] = [param for param in self.params if param.param_type_name == "option"]
        known = {name: not option.is_flag for option in options for name in (*option.opts, *option.secondary_opts)}
        known |= dict.fromkeys(self.get_help_option_names(ctx), False)
        settings: dict[str, str] = {}
        words, rest = list(args), []
        while words:
            word = words.pop(0)
            name, equals, value = word.partition("=")
            if not word.startswith("--") or len(name) == 2:
                rest.append(word)
            elif name in known:
                rest.append(word)
                if known[name] and not equals and words:
                    rest.append(words.pop(0))
            elif equals or words:
                settings[name[2:].replace("-", "_")] = value if equals else words.pop(0)
            else:
                raise UserError(f"The option {name} needs a value.")
        ctx.meta[SETTINGS] = settings
        return super().parse_args(ctx, rest)


def settings_of(context: typer.Context) -> dict[str, str]:
    """Return the settings that were given to a `SettingsCommand`, as they were typed."""
    return dict(context.meta[SETTINGS])
