"""All sessions run in one shared environment, `.nox/tokenbridge`, installed once from `constraints.txt`.

Arguments after `--` go to the command: `nox -s tests -- -k quantizer`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "typecheck", "tests"]

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".nox" / "tokenbridge"
SCRIPTS = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin")
INSTALLED = ENVIRONMENT / "installed-from.txt"


def shared_environment(session: nox.Session) -> None:
    """Make the environment, unless it was already made from the present requirements."""
    requirements = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    python = f"{sys.version} {ROOT}"  # a virtual environment is bound to both
    wanted = f"{python}\n{hashlib.sha256(requirements).hexdigest()}"
    installed = INSTALLED.read_text() if INSTALLED.exists() else ""
    if installed == wanted:
        return
    if not installed.startswith(python):
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        session.run(sys.executable, "-m", "venv", str(ENVIRONMENT), external=True)
    install = [
        "-m",
        "pip",
        "install",
        "--constraint",
        str(ROOT / "constraints.txt"),
        "--editable",
        f"{ROOT}[dev]",
    ]
    session.run(str(SCRIPTS / "python"), *install, external=True)
    INSTALLED.write_text(wanted)


def run(session: nox.Session, command: str, *arguments: str) -> None:
    """Run a command of the shared environment."""
    shared_environment(session)
    session.run(str(SCRIPTS / command), *arguments, external=True)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests."""
    # One thread a worker: the tests' tensors are small, and two workers use two cores better.
    workers = [] if session.posargs else ["--numprocesses", "2", "--dist", "loadfile"]
    run(session, "python", "-m", "pytest", *workers, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style: ruff's lint and format."""
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Types: mypy."""
    run(session, "mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Every command of the README and the guides, in order, in a fresh shell: seven minutes on two cores."""
    run(session, "python", "-m", "pytest", "-m", "docs", "tests/docs", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks, as ratios measured side by side."""
    run(session, "python", "-m", "pytest", "benchmarks", "--benchmark-enable", *session.posargs)


@nox.session
def bench_l(session: nox.Session) -> None:
    """Sampling speed of TokenBridge-L beside the reference path: six minutes on two cores that do nothing else."""
    run(session, "python", "-m", "benchmarks.speed_l", *session.posargs)


@nox.session
def conformance_l(session: nox.Session) -> None:
    """Golden cases of the L size, made with our own reference path: 4 GB of memory, a minute on two cores."""
    run(session, "tokenbridge", "conformance", "reference_results/goldens-own", *session.posargs)


@nox.session
def reproduce_tiny(session: nox.Session) -> None:
    """Main job: rebuild the tables at tiny scale from the shipped weights; pictures in runs/tiny/."""
    run(session, "tokenbridge", "reproduce", "tiny", *session.posargs)


@nox.session
def discrepancies(session: nox.Session) -> None:
    """What each discrepancy between paper and code does, at tiny scale: tables in runs/discrepancies/."""
    run(session, "tokenbridge", "discrepancies", *session.posargs)


@nox.session
def train_tiny(session: nox.Session) -> None:
    """Train all tiny models from nothing into runs/tiny-training/."""
    run(session, "tokenbridge", "train", "tiny", *session.posargs)


@nox.session(name="reproduce_L")
def reproduce_l(session: nox.Session) -> None:
    """TokenBridge-L's row of table 3: needs the published weights; `-- --plan`, `-- --stand-in`."""
    run(session, "tokenbridge", "reproduce", "tokenbridge-l", *session.posargs)


@nox.session(name="reproduce_H")
def reproduce_h(session: nox.Session) -> None:
    """TokenBridge-H's row of table 3; as reproduce_L."""
    run(session, "tokenbridge", "reproduce", "tokenbridge-h", *session.posargs)


@nox.session
def reproduce_mar(session: nox.Session) -> None:
    """MAR's row of table 3: `-- --size l` (the default), b or h; otherwise as reproduce_L."""
    run(session, "tokenbridge", "reproduce", "mar", *session.posargs)


@nox.session
def reproduce_llamagen(session: nox.Session) -> None:
    """LlamaGen's row of table 3: `-- --size 3b` (the default), b-256, b-384, l, xl, xxl; otherwise as reproduce_L."""
    run(session, "tokenbridge", "reproduce", "llamagen", *session.posargs)


@nox.session
def reproduce_givt(session: nox.Session) -> None:
    """GIVT's row of table 3; as reproduce_L."""
    run(session, "tokenbridge", "reproduce", "givt", *session.posargs)


@nox.session
def reproduce_tables(session: nox.Session) -> None:
    """Table 1 and all rows of table 3 whose files are here; the others are listed as not run."""
    run(session, "tokenbridge", "reproduce", "all", *session.posargs)


@nox.session
def reproduce_table1(session: nox.Session) -> None:
    """Table 1 at the paper's scale: needs ImageNet, the published VAE, Inception's weights and statistics."""
    run(session, "tokenbridge", "reproduce", "table1", *session.posargs)


@nox.session
def gate(session: nox.Session) -> None:
    """Regression gate: golden cases, tiny results, tokens, benchmark ratios against the stored ones; `-- --quick`."""
    run(session, "tokenbridge", "gate", *session.posargs)


@nox.session
def update_references(session: nox.Session) -> None:
    """Show how newly measured references differ; `-- --write --why "..."` replaces the stored ones."""
    run(session, "tokenbridge", "update-references", *session.posargs)
