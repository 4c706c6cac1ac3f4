"""Every command of the README and the guides is run as a reader would: in order, in one folder, in a fresh shell.

`nox -s docs` runs these tests, which take minutes. Where a command takes longer, or needs published files, a GPU or a
network, `WAYS` says what is run in its place: the same command on less, or up to its refusal.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pages
import pytest
from pages import PAGES, ROOT, Command


@dataclass(frozen=True)
class Way:
    """How a command is run: what is run in its place, its exit codes, and whether the numbers that it prints vary."""

    instead: str | None = None  # None: the command itself; "": nothing, it is only parsed (test_pages.py)
    codes: tuple[int, ...] = (0,)
    numbers_vary: bool = False


AS_IT_IS = Way()
TIMED = (0, 1)  # 1 where other work on the machine disturbs the times of table 5
REFUSED = Way(codes=(2,))  # as it is; what it needs is not there
TOO_LONG = Way("")  # minutes or hours; its tests run it at a small size
OFFLINE = "HF_HUB_OFFLINE=1 "  # a machine with a network would download gigabytes

WAYS = {
    # README.md. nox is stood in for: it is not in the environment that it makes.
    "python -m pip install nox && nox -s reproduce_tiny": Way("nox -s reproduce_tiny", TIMED),
    "python -m pip install nox && nox -s tests": Way("nox -s tests -- -q tests/test_layers.py"),
    "source .nox/tokenbridge/bin/activate": AS_IT_IS,
    "tokenbridge --help": AS_IT_IS,
    # docs/audit.md
    "nox -s reproduce_tiny": Way("test -f runs/tiny/results.json"),  # it has just run
    "tokenbridge audit": Way(codes=TIMED),
    "nox -s reproduce_mar -- --size l --plan": Way(codes=(1,), numbers_vary=True),
    "nox -s reproduce_L": Way("nox -s reproduce_L -- --offline", (1,)),
    "nox -s reproduce_tables": AS_IT_IS,
    "nox -s reproduce_L -- --stand-in": TOO_LONG,
    "tokenbridge audit --samples DIR --claim table3/tokenbridge-l/fid": Way(
        "tokenbridge audit --samples reference_results/tiny --claim table3/tokenbridge-l/fid --offline", (2,)
    ),
    # docs/develop.md
    "tokenbridge conformance reference_results/goldens/*.npz": AS_IT_IS,
    "tokenbridge train tiny mar --out runs/mine": Way(
        "mkdir -p runs/mine/weights && cp -r reference_results/tiny/weights/mar runs/mine/weights"
    ),
    "tokenbridge reproduce tiny --weights runs/mine/weights --out runs/mine/tables": Way(
        "tokenbridge reproduce tiny --weights runs/mine/weights --out runs/mine/tables --num-images 100", TIMED
    ),
    "tokenbridge sample tiny/givt --label 7 --num-images 10 --out runs/sevens": AS_IT_IS,
    "tokenbridge sample tiny/mar --weights runs/mine/weights --num-images 10 --out runs/mine/samples": AS_IT_IS,
    "tokenbridge discrepancies": TOO_LONG,
    "tokenbridge convert checkpoint-last.pth tokenbridge-l --vae kl16.ckpt --out tokenbridge-l": REFUSED,
    # docs/benchmark.md
    "nox -s bench": Way("nox -s bench -- --collect-only -q"),
    "nox -s bench_l": Way("nox -s bench_l -- --help"),
    "tokenbridge sample tokenbridge-l --num-images 50000 --plan": REFUSED,
    "torchrun --nproc-per-node 8 -m tokenbridge sample tokenbridge-l --num-images 50000": Way(
        "tokenbridge sample tokenbridge-l --num-images 50000 --offline", (2,)
    ),
    "torchrun --nproc-per-node 2 -m tokenbridge sample tiny/mar --num-images 20 --out runs/two": AS_IT_IS,
    "tokenbridge models": AS_IT_IS,
    "tokenbridge evaluate SAMPLES --reference VIRTUAL_imagenet256_labeled.npz": Way(
        "tokenbridge evaluate runs/sevens/images --reference runs/two/images --offline", (2,)
    ),
    "tokenbridge reference IMAGES --out stats.npz": Way(
        "tokenbridge reference runs/sevens/images --out stats.npz --offline", (2,)
    ),
    "tokenbridge reconstruct digits": AS_IT_IS,
    "tokenbridge reconstruct PHOTOS --tokenizer FOLDER_OR_HUB_NAME --image-size 256": Way(
        "tokenbridge reconstruct PHOTOS --tokenizer FOLDER_OR_HUB_NAME --image-size 256 --offline", (2,)
    ),
    # docs/ci.md
    "nox -s gate": Way("nox -s gate -- goldens"),
    "nox -s gate -- --quick": TOO_LONG,  # CI runs it beside these tests
    "nox -s gate -- tokens": AS_IT_IS,
    'nox -s update_references -- benchmarks --write --why "our CI machine"': TOO_LONG,  # and it would write
    "nox -s update_references": TOO_LONG,
    'nox -s update_references -- --write --why "the autoencoder was trained longer"': TOO_LONG,
    # docs/files.md
    "tokenbridge artifacts": AS_IT_IS,
    "tokenbridge artifacts adm-statistics inception --download --folder published": Way(
        OFFLINE + "tokenbridge artifacts adm-statistics inception --download --folder published", (2,)
    ),
    "export TOKENBRIDGE_ARTIFACTS=published": AS_IT_IS,
    "tokenbridge sample tokenbridge-l --offline": REFUSED,
    # tokenbridge/models/README.md: tests/models/test_fifth_system.py takes a system through them.
    "tokenbridge train tiny vae vq classifier yours --out runs/yours": REFUSED,
    "tokenbridge sample tiny/yours --weights runs/yours/weights --label 3": REFUSED,
    "tokenbridge sample tiny/yours --plan": REFUSED,
    "tokenbridge reproduce tiny --weights runs/yours/weights": TOO_LONG,
    # reference_results/goldens-own/README.md
    "python -m benchmarks.make_golden reference_results/goldens-own": TOO_LONG,
}
PYTHON_RUNS = ("docs/audit.md",)  # the other blocks of Python need a GPU and published weights


@dataclass(frozen=True)
class Printed:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def walk(commands: list[str], folder: Path, results: Path) -> list[Printed]:
    """Run commands one after another in one fresh shell, and return what each printed."""
    results.mkdir(parents=True)
    lines = []
    for number, command in enumerate(commands):
        to = results / str(number)
        lines += [f"{{ {command}", f"}} >{to}.out 2>{to}.err", f"echo $? >{to}.code"]
    environment = {
        "HOME": str(folder / "home"),
        "PATH": f"{folder / 'commands'}:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "ENVIRONMENT": sys.prefix,
    }
    subprocess.run(["bash", "-c", "\n".join(lines)], cwd=folder, env=environment, check=True)
    texts = [[(results / f"{n}.{end}").read_text() for end in ("code", "out", "err")] for n in range(len(commands))]
    return [Printed(int(code), out, err) for code, out, err in texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that looks like a checkout after nox has made its environment; runs/ in it is empty."""
    folder = tmp_path_factory.mktemp("walk")
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".nox", "runs"):
            (folder / entry.name).symlink_to(entry)
    (folder / ".nox").mkdir()
    (folder / ".nox" / "tokenbridge").symlink_to(sys.prefix)
    (folder / "home").mkdir()
    (folder / "commands").mkdir()
    nox = folder / "commands" / "nox"
    nox.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests/docs/nox_stand_in.py"} "$@"\n')
    nox.chmod(0o755)
    return folder


def _plain(line: str, numbers_vary: bool) -> str:
    """Return a line without what depends on the width of a table's columns, or on the machine."""
    line = re.sub(r"[━─]+", "─", re.sub(r"\s+", " ", line.rstrip()))
    return re.sub(r"\d[\d.,]*", "0", line) if numbers_vary else line


def matches(shown: tuple[str, ...], printed: str, *, numbers_vary: bool = False) -> str | None:
    """Return the first shown line that was not printed in its place; None if all were.

    `...` alone stands for any lines, and within a line for any text.
    """
    lines = [_plain(line, numbers_vary) for line in printed.splitlines()]
    place, anywhere = 0, False
    for line in shown:
        if line == "...":
            anywhere = True
            continue
        pattern = ".*".join(re.escape(part) for part in _plain(line, numbers_vary).split("..."))
        last = len(lines) if anywhere else min(place + 1, len(lines))
        found = next((i for i in range(place, last) if re.fullmatch(pattern, lines[i])), None)
        if found is None:
            return line
        place, anywhere = found + 1, False
    return None if anywhere or place == len(lines) or not shown else f"(the end: {lines[place]})"


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_do_what_it_says(page: str, folder: Path) -> None:
    commands = [command for command in pages.commands_of(page) if WAYS[command.text].instead != ""]
    run = [WAYS[command.text].instead or command.text for command in commands]
    python = [block for block in pages.blocks_of(page) if block.language == "python" and page in PYTHON_RUNS]
    run += ["python - <<'END'\n" + "\n".join(block.lines) + "\nEND\n" for block in python]
    commands += [Command(page, block.line, "python") for block in python]
    if page != "README.md":
        run.insert(0, "source .nox/tokenbridge/bin/activate")
        commands.insert(0, Command(page, 0, "source .nox/tokenbridge/bin/activate"))
    wrong = []
    for command, done in zip(commands, walk(run, folder, folder / "printed" / page), strict=True):
        way = WAYS.get(command.text, AS_IT_IS)
        told = f"{page}:{command.line}: {command.text}"
        if done.code not in way.codes:
            wrong.append(f"{told}: exit code {done.code}, not {way.codes}\n{done.out}{done.err}")
        elif "Traceback" in done.err:
            wrong.append(f"{told}: traceback\n{done.err}")
        else:
            printed = done.err if command.shown and command.shown[0].startswith("Error:") else done.out
            if (line := matches(command.shown, printed, numbers_vary=way.numbers_vary)) is not None:
                wrong.append(f"{told}: does not print {line!r}, but:\n{printed}")
    assert wrong == [], "\n\n".join(wrong)


def test_a_fresh_shell_knows_the_command_only_after_its_environment_is_on_the_path(folder: Path) -> None:
    """The control of the walk, and its quick part, which runs with all tests."""
    if not os.access(Path(sys.prefix) / "bin" / "activate", os.R_OK):
        pytest.skip("the tests do not run in a virtual environment")
    source = "source .nox/tokenbridge/bin/activate"
    commands = ["tokenbridge --help", source, "tokenbridge audit --help", "(exit 3)"]
    before, sourced, after, other = walk(commands, folder, folder / "printed" / "control")
    assert before.code == 127
    assert (sourced.code, sourced.out, sourced.err) == (0, "", "")
    assert (after.code, after.err) == (0, "")
    assert "--claim" in after.out
    assert other.code == 3


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        (("one", "two 2", "three"), None),
        (("one", "...", "three"), None),
        (("one", "two ...", "..."), None),
        (("...", "three"), None),
        (("one", "three"), "three"),
        (("two 2",), "two 2"),
        (("one", "two 3", "three"), "two 3"),
        (("...", "four"), "four"),
        (("one", "two 2"), "(the end: three)"),
        (("three", "...", "one"), "three"),
    ],
)
def test_shown_lines_are_compared_in_order(shown: tuple[str, ...], wrong: str | None) -> None:
    assert matches(shown, "one\ntwo   2\nthree\n") == wrong


def test_numbers_that_vary_are_not_compared() -> None:
    assert matches(("3 cores, 1.5e+09",), "128 cores, 7.25e+09", numbers_vary=True) is None
    assert matches(("3 cores",), "3 hours", numbers_vary=True) == "3 cores"
