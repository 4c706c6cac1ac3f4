"""Targets by name: which there are, which options they have a use for, and the old names of the command."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import pytest
from conftest import Run, error_of

from tokenbridge.cli import options as cli_options
from tokenbridge.models.registry import SHIPPED_PRESETS, all_presets
from tokenbridge.reproduction import small_scale, table1, table3, targets
from tokenbridge.reproduction.options import Options
from tokenbridge.reproduction.targets import GROUPS, USED_BY, Target, find_targets
from tokenbridge.results.schema import Results
from tokenbridge.sampling.config import Format, Randomness
from tokenbridge.utils.devices import Dtype
from tokenbridge.utils.errors import UserError
from tokenbridge.weights import artifacts


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in an empty folder, with empty caches and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(artifacts.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((small_scale, "reproduce_scale"), (table1, "reproduce_table1"), (table3, "reproduce_table3")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("nothing should run"))


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("tiny", None, Target("tiny", "scale")),
        ("small", None, Target("small", "scale")),
        ("table1", None, Target("table1", "table1")),
        ("tokenbridge-l", None, Target("tokenbridge-l", "row")),
        ("tokenbridge", None, Target("tokenbridge-l", "row")),
        ("mar", None, Target("mar-l", "row")),
        ("mar", "h", Target("mar-h", "row")),
        ("mar_huge", None, Target("mar-h", "row")),
        ("llamagen", "b-256", Target("llamagen-b-256", "row")),
    ],
)
def test_one_target(name: str, size: str | None, expected: Target) -> None:
    assert find_targets([name], Options(size=size)) == [expected]
    assert find_targets([name, name], Options(size=size)) == [expected]


def test_several_targets() -> None:
    published = [Target(name, "row") for name in all_presets() if name not in SHIPPED_PRESETS]
    assert find_targets(["all"], Options()) == [Target("table1", "table1"), *published]
    assert find_targets(["all", "mar"], Options()) == find_targets(["all"], Options())
    # A preset whose weights were not published is one of several, and not one alone.
    some = find_targets(["mar", "tokenbridge-b", "table1"], Options())
    assert some == [Target("mar-l", "row"), Target("tokenbridge-b", "row"), Target("table1", "table1")]
    with pytest.raises(UserError, match="tokenbridge-b cannot be reproduced"):
        find_targets(["tokenbridge-b"], Options())


@pytest.mark.parametrize("names", [["tiny", "table1"], ["mar-l", "small"], ["all", "tiny"]])
def test_a_scale_is_reproduced_alone(names: list[str]) -> None:
    with pytest.raises(UserError, match=r"^(tiny|small) is not a target of the paper's scale: reproduce it alone\.$"):
        find_targets(names, Options())


def test_an_unknown_target(run_command: Run) -> None:
    message = error_of(run_command("reproduce", "huge"))
    assert "Unknown target 'huge'; there are tiny, small, table1, tokenbridge, mar, llamagen, givt, " in message
    assert message.endswith(", all.")
    assert "Unknown target 'huge'" in error_of(run_command("reproduce", "table1", "huge"))


# An option of each kind, on the command line, and a value that is not its default.
OPTIONS: dict[str, tuple[str, ...]] = {
    "plan": ("--plan",),
    "stand_in": ("--stand-in",),
    "folder": ("--folder", "."),
    "batch_size": ("--batch-size", "3"),
    "precision_recall": ("--no-precision-recall",),
    "data": ("--data", "digits"),
    "weights": ("--weights", "."),
    "reference": ("--reference", "file"),
    "imagenet": ("--imagenet", "."),
    "other_inception": ("--other-inception", "file"),
    "vae": ("--vae", "file"),
    "inception": ("--inception", "file"),
    "reference_batch": ("--reference-batch", "file"),
    "size": ("--size", "l"),
    "variant": ("--variant", "paper"),
    "randomness": ("--randomness", "official"),
    "labels": ("--labels", "random"),
    "dtype": ("--dtype", "bf16"),
    "compiled": ("--compile",),
    "num_bootstrap": ("--num-bootstrap", "3"),
}
TARGETS = {"scale": ["tiny"], "table1": ["table1"], "row": ["mar"], "several": ["all"]}


def test_every_option_is_declared() -> None:
    for_all = {"num_images", "seed"}
    assert {field.name for field in fields(Options)} | {"plan"} == USED_BY.keys() | for_all
    assert USED_BY.keys() == OPTIONS.keys()
    assert all(set(users) < set(GROUPS) for users in USED_BY.values())


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("group", GROUPS)
def test_options_of_other_targets_are_refused(run_command: Run, group: Any) -> None:
    for option, words in OPTIONS.items():
        if group not in USED_BY[option]:
            message = error_of(run_command("reproduce", *TARGETS[group], *words))
            assert message.startswith(f"Error: {words[0]} goes with ")
            assert message.endswith(f", not with {TARGETS[group][0]}.")
            assert all((GROUPS[user] in message) == (user in USED_BY[option]) for user in GROUPS if user != "table1")
    assert not Path("runs").exists()


@pytest.mark.parametrize("group", GROUPS)
def test_options_that_a_target_uses_reach_it(run_command: Run, monkeypatch: pytest.MonkeyPatch, group: Any) -> None:
    """All but --plan, which runs nothing, together."""
    seen: list[dict[str, Any]] = []

    def note(*arguments: Any, **named: Any) -> tuple[Results, dict[str, Any]]:
        seen.append({**{f.name: getattr(o, f.name) for o in arguments if isinstance(o, Options) for f in fields(o)}})
        seen[-1] |= named
        raise UserError("seen")

    monkeypatch.setattr(small_scale, "reproduce_scale", note)
    monkeypatch.setattr(table1, "reproduce_table1", note)
    monkeypatch.setattr(table3, "reproduce_table3", note)
    used = [option for option in OPTIONS if group in USED_BY[option] and option != "plan"]
    words = [word for option in used for word in OPTIONS[option]]
    code, _, err = run_command("reproduce", *TARGETS[group], *words, "--num-images", "7", "--seed", "3")
    assert code == (0 if group == "several" else 2), err
    for each in seen:
        assert (each["num_images"], each["seed"]) == (7, 3)
        for option in used:
            if option in each:
                assert each[option] != getattr(Options(), option)
    assert len(seen) > 10 if group == "several" else len(seen) == 1


def test_choices_are_those_of_the_package() -> None:
    assert get_args(cli_options.DtypeName) == get_args(Dtype)
    assert get_args(cli_options.Randomness) == get_args(Randomness)
    assert get_args(cli_options.FileFormat) == get_args(Format)


# Plans


def test_plan_of_all(run_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few presets: operations are counted by running each model on the meta device."""
    some = ("tokenbridge-b", "tokenbridge-l", "mar-b", "tokenbridge-tiny")
    monkeypatch.setattr(targets, "all_presets", lambda: {name: all_presets()[name] for name in some})
    code, out, _ = run_command("reproduce", "all", "--plan", "--json")
    planned = {entry["id"]: entry for entry in json.loads(out)}
    assert code == 0
    assert list(planned) == ["table1", "table3/tokenbridge-b", "table3/tokenbridge-l", "table3/mar-b"]
    assert planned["table1"]["not_run"].startswith("missing: imagenet, kl16, inception, adm-statistics")
    assert planned["table3/mar-b"]["plan"]["num_images"] == 50_000
    assert planned["table3/tokenbridge-b"]["not_run"] == "no weights and no sampling settings were published"
    assert "plan" not in planned["table3/tokenbridge-b"]
    assert not Path("runs").exists()


def test_plan_of_some_is_a_table(run_command: Run) -> None:
    code, out, _ = run_command("reproduce", "mar-b", "table1", "--plan")
    assert code == 0
    assert [line.split("│")[1].strip() for line in out.splitlines() if "missing" in line] == ["table3/mar-b", "table1"]


def test_plan_of_one(run_command: Run) -> None:
    code, out, _ = run_command("reproduce", "mar", "--size", "b", "--plan")
    assert code == 2
    assert "Plan: mar-b" in out
    assert "tokenbridge artifacts mar-b kl16 inception adm-statistics adm-reference --download" in out
    assert "TFLOP per image" in out
    code, out, _ = run_command("reproduce", "mar", "--size", "b", "--plan", "--json", "--num-images", "100")
    planned = json.loads(out)
    assert (planned["model"], planned["num_images"]) == ("mar-b", 100)
    assert len(planned["missing"]) == 5


# Several without files


@pytest.mark.usefixtures("nothing_runs")
def test_all_without_files_are_not_run(run_command: Run) -> None:
    code, out, _ = run_command("reproduce", "all")
    assert code == 0
    assert out.count("not run") == len(all_presets()) - len(SHIPPED_PRESETS) + 1
    assert "Tables 1 and 3: measured (published)" in out


def test_a_target_alone_without_files_is_an_error(run_command: Run) -> None:
    assert "5 files are missing" in error_of(run_command("reproduce", "mar"))
    assert "4 files are missing" in error_of(run_command("reproduce", "table1"))


# The old names, for one release


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["reproduce-table1", "--plan", "--json"], ["table1", "--plan", "--json"]),
        (["reproduce-table3", "mar", "--size", "b", "--num-images", "1"], ["mar", "--size", "b", "--num-images", "1"]),
        (["reproduce-tables", "--num-images", "100"], ["all", "--num-images", "100"]),
        (["reproduce-tables", "table1", "mar-b"], ["table1", "mar-b"]),
        (["reproduce-table1", "--bogus"], ["table1", "--bogus"]),
    ],
)
def test_old_names_do_what_the_new_one_does(run_command: Run, old: list[str], new: list[str]) -> None:
    code, out, err = run_command(*old)
    expected = run_command("reproduce", *new)
    assert (code, out) == expected[:2]
    if "--bogus" not in old:
        first, rest = err.split("\n", 1)
        assert first.startswith(f"`tokenbridge {old[0]}` is now `tokenbridge reproduce ")
        assert rest == expected[2]


def test_old_names_are_hidden_and_results_name_the_new_command(
    run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run_command("--help")
    assert code == 0
    assert "reproduce" in out
    assert "reproduce-table" not in out
    commands: list[str] = []

    def note(*_: Any, **__: Any) -> Any:
        from tokenbridge.utils import provenance

        commands.append(provenance.command())
        raise UserError("seen")

    monkeypatch.setattr(table1, "reproduce_table1", note)
    monkeypatch.setattr(table3, "reproduce_table3", note)
    run_command("reproduce-table1", "--seed", "3")
    run_command("reproduce-table3", "mar-l", "--seed", "3")
    assert commands == ["tokenbridge reproduce table1 --seed 3", "tokenbridge reproduce mar-l --seed 3"]
    assert "Name a model" in error_of(run_command("reproduce-table3"))
