"""`import tokenbridge`: quick, and what the commands do is there as documented functions."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tokenbridge


def python(code: str) -> str:
    """Run code in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_loads_no_library() -> None:
    heavy = ("torch", "numpy", "pydantic", "diffusers", "datasets", "matplotlib")
    assert python(f"import sys, tokenbridge; print([name for name in {heavy} if name in sys.modules])") == "[]"


@pytest.mark.parametrize("name", [name for name in tokenbridge.__all__ if name != "__version__"])
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value: Any = getattr(tokenbridge, name)
    function = getattr(value, name) if inspect.ismodule(value) else value
    assert callable(value)
    assert inspect.getdoc(function)
    assert function.__module__.startswith("tokenbridge.")


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'tokenbridge' has no attribute 'nothing'"):
        _ = tokenbridge.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("first", ["", "from tokenbridge.audit import Audit"])  # which imports reproduce
def test_functions_that_share_a_modules_name_whatever_was_imported_before(first: str) -> None:
    code = f"""
import tokenbridge
{first}
for i in range(2):
    for function, options in ((tokenbridge.audit, dict(fail_on=["nothing"])), (tokenbridge.reproduce, {{}})):
        try:
            function(**options)
        except (ValueError, TypeError) as error:
            print(type(error).__name__, str(error)[:26])
from tokenbridge.audit import Audit
import tokenbridge.reproduce as module
assert module.trends
"""
    assert (
        python(code).splitlines()
        == [
            "ValueError The gate fails on 'worse' ",
            "TypeError reproduce() missing 1 requ",
        ]
        * 2
    )


def test_sample_as_a_function(tmp_path: Path) -> None:
    report = tokenbridge.sample(
        "tiny/tokenbridge-64", out=tmp_path, num_images=3, labels=(1, 2, 3), num_iterations=2, show_progress=False
    )
    assert report.num_images == 3
    assert len(list(report.samples.glob("*.png"))) == 3
    with pytest.raises(ValueError, match="Unknown recipe 'nothing'"):
        tokenbridge.sample("tiny/nothing", out=tmp_path / "other")
