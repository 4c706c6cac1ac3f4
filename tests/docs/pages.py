"""The pages for readers, their code blocks and the commands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# In the order in which they are read and walked through.
PAGES = (
    "README.md",
    "docs/audit.md",
    "docs/develop.md",
    "docs/benchmark.md",
    "docs/ci.md",
    "docs/files.md",
    "tokenbridge/models/README.md",
    "reference_results/paper/README.md",
    "reference_results/tiny/README.md",
    "reference_results/goldens/README.md",
    "reference_results/goldens-own/README.md",
    "reference_results/benchmarks/tokenbridge-l-cpu.md",
)
SHELL = ("python", "nox", "tokenbridge", "torchrun", "source", "export", "hf")
"""What the first word of a command can be."""


@dataclass(frozen=True)
class Block:
    """A code block: its language ("" of an indented one) and its lines."""

    page: str
    line: int
    language: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """A command, and the lines that the page shows of what it prints."""

    page: str
    line: int
    text: str
    shown: tuple[str, ...] = ()


def blocks_of(page: str) -> list[Block]:
    """Return the fenced and the indented code blocks of a page."""
    found: list[Block] = []
    language: str | None = None  # of the fence that is open
    current: list[str] = []
    start = 0
    blank = True  # whether the line before was
    for number, line in enumerate([*(ROOT / page).read_text(encoding="utf-8").splitlines(), ""], 1):
        indented = language is None and line.startswith("    ") and (blank or bool(current))
        if language is None and current and not indented:
            found.append(Block(page, start, "", tuple(current)))
            current = []
        if line.startswith("```"):
            if language is None:
                language, start = line[3:].strip(), number + 1
            else:
                found.append(Block(page, start, language, tuple(current)))
                language, current = None, []
        elif language is not None:
            current.append(line)
        elif indented:
            start = start if current else number
            current.append(line[4:])
        blank = not line.strip()
    assert language is None, f"{page}: a fence is not closed"
    return found


def commands_of(page: str) -> list[Command]:
    """Return the commands of a page, in order."""
    found: list[Command] = []
    for block in blocks_of(page):
        if block.language == "console":
            for number, line in enumerate(block.lines, block.line):
                if line.startswith("$ "):
                    found.append(Command(page, number, line[2:]))
                else:
                    last = found.pop()
                    found.append(Command(page, last.line, last.text, (*last.shown, line)))
        elif block.language == "sh" or (not block.language and block.lines[0].split()[0] in SHELL):
            lines = enumerate(block.lines, block.line)
            found += [Command(page, n, line) for n, line in lines if line.strip() and not line.startswith("#")]
    return found


def spans_of(page: str) -> list[str]:
    """Return the commands that stand in the running text of a page, as `tokenbridge models`."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", re.sub(r"\s*\n\s*", " ", text))
    return [span for span in spans if span.split()[0] in ("tokenbridge", "nox") and len(span.split()) > 1]
