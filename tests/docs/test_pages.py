"""What the README and the guides say is so: their commands parse, their sessions exist, their links lead somewhere.

`nox -s docs` runs the commands; see test_walk.py.
"""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import nox_stand_in
import pages
import pytest
import typer
from pages import PAGES, ROOT
from test_walk import WAYS

import tokenbridge
from tokenbridge.cli import audit, evaluate, reproduce, sample, train, weights  # noqa: F401  they register commands
from tokenbridge.cli.options import app

COMMANDS = [command for page in PAGES for command in pages.commands_of(page)]
GROUP: Any = typer.main.get_command(app)
_, SESSIONS = nox_stand_in.read_noxfile(ROOT / "noxfile.py")
WIDTH = 95  # columns of a code block that GitHub shows without a scroll bar
SHOWN_ONCE = {"README.md": 2}  # the two commands that set everything up stand as they are


def parse(words: list[str]) -> None:
    """Parse the words of a command line as the command does, and run nothing.

    Raises:
        Exception: they do not fit.
    """
    if words[0] == "torchrun":
        assert words[words.index("-m") + 1] == "tokenbridge"
        words = words[words.index("-m") + 1 :]
    if words[0] == "tokenbridge":
        if words[1:] == ["--help"]:
            return
        command = GROUP.commands[words[1]]
        command.make_context(words[1], [word for word in words[2:] if word != "..."])
    elif words[0] == "nox":
        assert words[1] == "-s"
        split = words.index("--") if "--" in words else len(words)
        for name in words[2:split]:
            assert name in SESSIONS, name
            if (command_line := _command_of(name)) is not None:
                parse([*command_line, *words[split + 1 :]])


def _command_of(session: str) -> list[str] | None:
    """Return the command of ours that a session runs."""
    ran: list[list[str]] = []
    noxfile, sessions = nox_stand_in.read_noxfile(ROOT / "noxfile.py")
    noxfile.run = lambda _, *command: ran.append(list(command))
    sessions[session](nox_stand_in.Session([]))
    return ran[0] if ran[0][0] == "tokenbridge" else None


def test_there_are_pages_and_commands() -> None:
    """The reader of the pages finds what is there: a control of the other tests."""
    by_page = {page: [c.text for c in COMMANDS if c.page == page] for page in PAGES}
    assert by_page["README.md"][:2] == [
        "python -m pip install nox && nox -s reproduce_tiny",
        "python -m pip install nox && nox -s tests",
    ]
    assert len(COMMANDS) > 30
    (shown,) = (c.shown for c in COMMANDS if c.text.startswith("tokenbridge conformance reference_results/goldens/"))
    assert shown[-1] == "33 of 33 files pass."
    assert "tokenbridge audit --accept REASON" in pages.spans_of("docs/ci.md")
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")}
    assert found <= set(PAGES)


def test_every_command_has_a_way_through_the_walk() -> None:
    """A command that nobody runs, and an entry for a command that is gone, fail."""
    assert {command.text for command in COMMANDS} == set(WAYS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}:{command.line}")
def test_commands_parse(command: pages.Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as --offline does
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for part in command.text.split(" && "):
        parse(shlex.split(part))


def test_a_command_that_does_not_parse_is_found() -> None:
    for wrong in ("tokenbridge audit --no-such", "tokenbridge nothing", "nox -s nothing", "nox -s gate -- --no-such"):
        with pytest.raises(Exception):  # noqa: B017, PT011  the parser's own, KeyError, AssertionError
            parse(shlex.split(wrong))


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_running_text_parse(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for span in pages.spans_of(page):
        words = shlex.split(span)
        if words[0] == "tokenbridge" and (len(words) == 2 or words[1] in ("KEY...", "COMMAND")):
            assert words[1] in {*GROUP.commands, "COMMAND"}, span
        elif words[-1] != "NAME":
            parse(words)


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_are_not_wider_than_github_shows(page: str) -> None:
    wide = [
        f"{block.line + i}: {line}"
        for block in pages.blocks_of(page)
        for i, line in enumerate(block.lines)
        if len(line) > WIDTH and page != "reference_results/goldens/README.md"  # written by others
    ]
    assert wide == []


@pytest.mark.parametrize("page", PAGES)
def test_comments_of_commands_stand_above_them(page: str) -> None:
    assert [command.text for command in pages.commands_of(page) if "  #" in command.text] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    local = [target for target in targets if not target.startswith("http")]
    assert [target for target in local if not (ROOT / page).parent.joinpath(target).exists()] == []
    named = re.findall(r"`((?:tests|benchmarks|reference_results|tokenbridge|docs)/[\w./-]+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_readme_lists_all_commands_and_sessions() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {name: command for name, command in GROUP.commands.items() if not command.hidden}
    assert set(re.findall(r"^\| `tokenbridge ([\w-]+)`", text, re.MULTILINE)) == set(shown)
    table = text[text.index("| session (") : text.index("Arguments after `--`")]
    assert set(re.findall(r"`(\w+)`", table)) - {"discrepancies"} == set(SESSIONS) - {"discrepancies"}


def test_python_blocks_compile_and_use_names_of_the_library() -> None:
    blocks = [block for page in PAGES for block in pages.blocks_of(page) if block.language == "python"]
    assert blocks
    for block in blocks:
        tree = ast.parse("\n".join(block.lines))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(tokenbridge, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tokenbridge":
                assert hasattr(tokenbridge, node.attr)


def test_pages_have_no_tabs_and_a_heading() -> None:
    for page in PAGES:
        text = Path(ROOT / page).read_text(encoding="utf-8")
        assert text.startswith("# ")
        assert "\t" not in text
