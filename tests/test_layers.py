"""The layers of the package: a folder imports only from the folders below it, and no modules import in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

LAYERS = (  # from the ground up; folders of one layer do not import one another
    ("utils",),
    ("weights", "data", "results"),
    ("tokenizers",),
    ("models", "evaluation"),
    ("configs", "conformance"),
    ("training", "sampling"),
    ("reproduction",),
    ("audit",),
    ("regression",),
    ("cli",),
)
LEVEL = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}
TOP = {"__init__", "__main__"}  # the only modules outside the folders; they may import any of them


def imports_of(package: Path) -> dict[str, set[str]]:
    """Return the modules of the package, by dotted name, that each of its modules imports, anywhere in its code."""
    modules = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    folders = {name.removesuffix(".__init__") for name in modules if name.endswith(".__init__")}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} has a relative import, which this test does not follow"
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for dotted in wanted:
                if dotted.partition(".")[0] != package.name:
                    continue
                target = dotted.removeprefix(f"{package.name}.")
                if target not in modules and target not in folders:
                    target = target.rpartition(".")[0]  # a name in a module
                found[name].add(target if target in modules else f"{target}.__init__".lstrip("."))
    return found


def wrong_arrows(imports: dict[str, set[str]]) -> list[str]:
    """Return the imports that run against the layers, and the circles, each by name."""
    wrong = []
    for name, targets in imports.items():
        folder = name.partition(".")[0]
        if folder in TOP:
            continue
        for target in sorted(targets):
            below = target.partition(".")[0]
            if below != folder and not (below in LEVEL and LEVEL[below] < LEVEL[folder]):
                wrong.append(f"{name} -> {target}")
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        wrong.append(" -> ".join(reversed(error.args[1])))
    return wrong


def test_folders_import_from_those_below_them() -> None:
    assert wrong_arrows(imports_of(ROOT / "tokenbridge")) == []


def test_every_folder_has_a_layer_and_only_two_modules_lie_outside() -> None:
    package = ROOT / "tokenbridge"
    assert {path.stem for path in package.glob("*.py")} == TOP
    assert {path.parent.name for path in package.glob("*/__init__.py")} == set(LEVEL)


@pytest.mark.parametrize(
    ("file", "code", "arrow"),
    [
        ("utils/files.py", "from pkg.cli import main", "utils.files -> cli.main"),
        ("data/images.py", "from pkg.weights.rule import draw", "data.images -> weights.rule"),  # of one layer
        ("models/a.py", "def f():\n    from pkg.sampling.run import g", "models.a -> sampling.run"),  # in a function
        ("models/a.py", "import pkg.audit.page", "models.a -> audit.page"),
        ("models/b.py", "from pkg.models import a", "models.a -> models.b -> models.a"),  # a circle
    ],
)
def test_an_arrow_against_the_layers_is_named(tmp_path: Path, file: str, code: str, arrow: str) -> None:
    package = tmp_path / "pkg"
    modules = ("utils/files", "data/images", "weights/rule", "models/a", "models/b", "sampling/run", "audit/page")
    for name in (*modules, "cli/main", *(f"{folder}/__init__" for folder in LEVEL)):
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from pkg.models.b import x\n" if name == "models/a" else "")
    assert wrong_arrows(imports_of(package)) == []
    path = package / file
    path.write_text(f"{path.read_text()}{code}\n")
    assert wrong_arrows(imports_of(package)) == [arrow]
