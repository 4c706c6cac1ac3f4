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
    assert callable(value)
    assert inspect.getdoc(value)
    assert value.__module__.startswith("tokenbridge.")


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="No tokenbridge attribute nothing"):
        _ = tokenbridge.nothing  # type: ignore[attr-defined]


def test_public_names_are_listed() -> None:
    assert set(tokenbridge.__all__) <= set(dir(tokenbridge))
    assert {"sample", "train_recipe", "evaluate", "reproduce", "audit_claims"} <= set(tokenbridge.__all__)
    for name in tokenbridge.__all__:  # no folder of the package has the name of a public function
        assert not (Path(tokenbridge.__file__).parent / name).exists()


def test_sample_as_a_function(tmp_path: Path) -> None:
    report = tokenbridge.sample(
        "tiny/tokenbridge-64", out=tmp_path, num_images=3, labels=(1, 2, 3), num_iterations=2, show_progress=False
    )
    assert report.num_images == 3
    assert len(list(report.samples.glob("*.png"))) == 3
    with pytest.raises(ValueError, match="Unknown recipe 'nothing'"):
        tokenbridge.sample("tiny/nothing", out=tmp_path / "other")
