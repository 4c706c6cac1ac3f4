"""The command as a whole: help, and words that mean nothing."""

from __future__ import annotations

import re

import pytest
from conftest import Run, error_of

from tokenbridge.cli import options


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


@pytest.mark.parametrize("command", ["discrepancies", "train"])
def test_unknown_scale(run: Run, command: str) -> None:
    message = error_of(run(command, "huge"))
    assert "Unknown scale 'huge'; there are tiny, small, mini." in message
