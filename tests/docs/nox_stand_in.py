"""`nox -s SESSION... -- ARGUMENTS` for the walk through the docs: noxfile.py, but in the environment of the tests.

nox would make an environment of 6 GB first. As nox, it ends with 1 whatever the code of a command that fails.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

Sessions = dict[str, Callable[[Any], None]]


class Session:
    """What noxfile.py uses of nox.Session."""

    def __init__(self, posargs: list[str]) -> None:
        self.posargs = posargs

    def run(self, *command: str, external: bool) -> None:
        assert external  # the shared environment is not one of nox
        if code := subprocess.run(command, check=False).returncode:
            print(f"nox > Command {' '.join(command)} failed with exit code {code}", file=sys.stderr)
            sys.exit(1)


def read_noxfile(path: Path) -> tuple[Any, Sessions]:
    """Return noxfile.py as a module, and its sessions by name."""
    sessions: Sessions = {}

    def session(function: Any = None, *, name: str | None = None) -> Any:
        if function is None:
            return lambda function: session(function, name=name)
        sessions[name or function.__name__] = function
        return function

    nox: Any = types.ModuleType("nox")
    nox.session, nox.Session, nox.options = session, Session, types.SimpleNamespace()
    spec = importlib.util.spec_from_file_location("noxfile", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get("nox")
    sys.modules["nox"] = nox
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop("nox")
        if before is not None:
            sys.modules["nox"] = before
    return module, sessions


def main() -> None:
    """Run the sessions that the command line names."""
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    option, *names = words[:split]
    assert option == "-s"
    noxfile, sessions = read_noxfile(Path("noxfile.py"))
    noxfile.shared_environment = lambda _: None
    noxfile.SCRIPTS = Path(os.environ["ENVIRONMENT"]) / "bin"
    for name in names:
        sessions[name](Session(words[split + 1 :]))


if __name__ == "__main__":
    main()
