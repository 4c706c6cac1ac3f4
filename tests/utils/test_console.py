"""What is printed: foreign names as they are, without their power over the terminal, to any kind of stream."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenbridge.utils import console
from tokenbridge.utils.text import plain

HOSTILE = [
    "[red]x",
    "f-[/red]x",
    "[/]",
    "[link=file:///etc]a[/link]",
    "a\\[b]",
    ":heart:",
    "\x1b[31m\x1b]0;title\x07x",
    "\x9b31mx",
    "a\rb",
    "\u202egnp.exe",
    "\udcff",
    "{0}{nothing}",
    "%s%d",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_foreign_name_is_shown_and_steers_nothing(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with console.lasting_streams():
        console.print_table(f"T {name} T", ["", f"H {name} H"], [["row", f"C {name} C"]])
        console.print_line(f"L {name} L")
        console.log(f"G {name} G")
        console.print_error(f"E {name} E")
        assert list(console.track([1, 2], name)) == [1, 2]
    out, err = capfd.readouterr()
    for text, letters in ((out, "THCL"), (err, "GE")):
        assert "\x1b" not in text
        for letter in letters:
            assert f"{letter} {plain(name)} {letter}" in text


@pytest.mark.parametrize("name", HOSTILE)
def test_a_foreign_name_in_a_bar(name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    monkeypatch.setenv("COLUMNS", "200")
    assert list(console.track(range(3), f"B {name} B", transient=False)) == [0, 1, 2]
    with console.progress(f"P {name} P", 2, "{done}", "{note}") as advance:
        advance(2, f"N {name} N")
    err = capfd.readouterr().err
    assert err.count("\x1b") > 0
    for letter in "BPN":
        assert f"{letter} {plain(name)} {letter}" in err


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_can_be_a_cell(cells: list[str]) -> None:
    console.print_table(cells[0], cells, [cells])
    console.print_line(cells[0])


RUN = """
import sys
from tokenbridge.utils.console import lasting_streams, log, print_line, print_table
with lasting_streams():
    for i in range(200):
        log("progress")
        print_table("Ä – ü", ["", "–"], [["│", "1"]])
        print_line(400 * "Ä")
    sys.stdout.flush()
    open(sys.argv[1], "w").write("the end was reached")
"""


@pytest.mark.parametrize(
    "redirection",
    ["| head -c 0", "2>&1 | head -n 1", ">&-", "2>&-", "<&- >&- 2>&-"],
)
def test_streams_that_go(redirection: str, tmp_path: Path) -> None:
    end = tmp_path / "end"
    result = _shell(f'"$0" -c "$1" "$2" {redirection}; exit ${{PIPESTATUS[0]}}', end)
    assert (result.returncode, end.read_text()) == (0, "the end was reached")
    assert "Traceback" not in result.stderr
    assert "Broken" not in result.stderr


def test_a_full_disk_behind_stdout_is_an_error(tmp_path: Path) -> None:
    result = _shell('"$0" -c "$1" "$2" > /dev/full', tmp_path / "end")
    assert "No space left on device" in result.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_a_stream_lacks(encoding: str, tmp_path: Path) -> None:
    result = _shell('"$0" -c "$1" "$2"', tmp_path / "end", PYTHONIOENCODING=encoding, LC_ALL="C")
    assert (result.returncode, (tmp_path / "end").read_text()) == (0, "the end was reached")


def _shell(line: str, *words: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", line, sys.executable, RUN, *map(str, words)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, encoding="latin-1", check=False, timeout=60
    )
