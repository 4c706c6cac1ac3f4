"""The command as a whole: help, and words that mean nothing."""

from __future__ import annotations

import json
import re
from typing import get_args

import pytest
import typer
from conftest import Run, error_of

from tokenbridge.cli import options
from tokenbridge.evaluation import reconstruct


def test_help_of_all_commands(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    commands = [
        command.callback.__name__.replace("_", "-")
        for command in options.app.registered_commands
        if command.callback and not command.hidden
    ]
    assert {"reproduce", "train", "sample", "reconstruct"} <= set(commands)
    for command in commands:
        assert command in out
        code, text, _ = run(command, "--help")
        assert code == 0
        assert re.search(rf"Usage: .*\b{command} \[OPTIONS\]", text)


def test_unknown_command_and_option(run: Run) -> None:
    for arguments in (["reporduce"], ["reproduce", "mini", "--num-image", "3"], ["reproduce", "mini", "--seed", "x"]):
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        assert "Error" in err


def test_choices_are_those_of_the_package() -> None:
    """They are spelled out in the command, so that --help loads nothing."""
    assert get_args(options.Quantizer) == reconstruct.QUANTIZERS


def test_every_number_has_bounds() -> None:
    """A number with more digits than a library counts with would be a bug's traceback."""
    command = typer.main.get_command(options.app)
    unbounded = {
        f"{name} --{parameter.name}"
        for name, subcommand in command.commands.items()  # type: ignore[attr-defined]
        for parameter in subcommand.params
        if parameter.type_descriptor.annotation is int and parameter.type_descriptor.parameter_info.max is None
    }
    # A run has bounds of its own for these, and streams of numbers from a seed of any size.
    assert unbounded == {f"sample --{name}" for name in ("num_images", "label", "seed", "batch_size")}


@pytest.mark.parametrize("words", [["sample", ""], ["sample", "--out", ""], ["sample", "--out="]])
def test_an_empty_word(run: Run, words: list[str]) -> None:
    assert error_of(run(*words)).startswith("Error: A word of the command line is empty")


@pytest.mark.parametrize("command", ["discrepancies", "train"])
def test_unknown_scale(run: Run, command: str) -> None:
    message = error_of(run(command, "huge"))
    assert "Unknown scale 'huge'; there are tiny, small, mini." in message


def test_claims_are_listed_by_their_ids(run: Run) -> None:
    code, out, _ = run("claims", "table2c", "--json")
    listed = json.loads(out)
    assert code == 0
    assert {claim["id"].partition("/")[0] for claim in listed} == {"table2c"}
    assert {claim["id"] for claim in listed} >= {"table2c/64/fid", "table2c/16/is"}
    code, out, err = run("claims", "table9")
    assert (code, out) == (2, "")
    assert "begins with 'table9'" in err
