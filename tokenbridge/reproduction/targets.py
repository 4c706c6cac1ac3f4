"""The targets that can be reproduced: a scale, table 1, a row of table 3, or several at the paper's scale.

`tokenbridge reproduce TARGET` calls `plan` or `reproduce`. If there are several targets, those whose files are present
run one after another, each into a folder of its own, and the others are listed as not run, with the reason. Nothing is
downloaded then, because the weights of all systems take some 50 GB. Users fetch the ones that they want
(`tokenbridge artifacts KEY... --download`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tokenbridge.configs.scales import SCALES, find_scale
from tokenbridge.models.registry import SHIPPED_PRESETS, all_presets, find_preset, published_preset, unpublished
from tokenbridge.reproduction import small_scale, table1, table3
from tokenbridge.reproduction.options import Options
from tokenbridge.results.compare import Judged, verdicts
from tokenbridge.results.ledger import published_metrics
from tokenbridge.results.schema import Results, Row
from tokenbridge.results.verdicts import Verdict
from tokenbridge.utils import files
from tokenbridge.utils.console import log
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.processes import process_state
from tokenbridge.weights.artifacts import how_to_fetch

TABLE1, ALL = "table1", "all"
SMALL_SCALE_IMAGES = 2000  # samples of each system

Group = Literal["scale", "table1", "row", "several"]

GROUPS: dict[Group, str] = {
    "scale": f"a scale ({', '.join(SCALES)})",
    "table1": "table1",
    "row": "a preset or system",
    "several": "several targets",
}
_PAPER: tuple[Group, ...] = ("table1", "row", "several")
USED_BY: dict[str, tuple[Group, ...]] = {
    "plan": _PAPER,
    "stand_in": _PAPER,
    "folder": _PAPER,
    "batch_size": _PAPER,
    "precision_recall": ("row", "several"),
    "data": ("scale",),
    "weights": ("scale", "row"),
    "reference": ("scale", "table1", "row"),
    "imagenet": ("table1",),
    "other_inception": ("table1",),
    "vae": ("table1", "row"),
    "inception": ("table1", "row"),
    **dict.fromkeys(("reference_batch", "size", "variant", "randomness", "labels"), ("row",)),
    **dict.fromkeys(("dtype", "compiled", "num_bootstrap"), ("row",)),
}
"""The targets that use an option. Every target uses the options that are not listed."""
_SPELLED = {"compiled": "--compile", "precision_recall": "--no-precision-recall"}


@dataclass(frozen=True)
class Target:
    """A scale, table 1, or a row of table 3, which has the name of its preset."""

    name: str
    group: Group

    @property
    def id(self) -> str:
        """The name of the target in plans, outcomes and result files."""
        return f"table3/{self.name}" if self.group == "row" else self.name


@dataclass(frozen=True)
class Planned:
    """The cost of a target, and why it cannot be run now."""

    name: str
    id: str
    not_run: str | None  # why the target cannot be run; None if it can
    plan: dict[str, Any] | None  # JSON values; None if nothing that could be run was published
    rows: list[tuple[str, str]]  # the same for people: names and amounts

    def as_json(self) -> dict[str, Any]:
        """Return the plan and what is missing as JSON values."""
        plan = {} if self.plan is None else {"plan": self.plan}
        return {"id": self.id, "not_run": self.not_run, **plan}


@dataclass(frozen=True)
class Reproduced:
    """The results of a target, and the folder that holds them."""

    target: Target
    out: Path
    results: Results | None  # None if the target was not run
    judged: Judged

    @property
    def failed(self) -> bool:
        """Whether a row is not reproduced."""
        return any(verdict == "not reproduced" for verdict, _ in self.judged.values())

    def as_json(self) -> dict[str, Any]:
        """Return results and verdicts as JSON values."""
        assert self.results is not None
        verdict_list = [{"id": id_, "verdict": verdict, "why": why} for id_, (verdict, why) in self.judged.items()]
        return {**self.results.model_dump(), "verdicts": verdict_list}


@dataclass(frozen=True)
class Outcome:
    """A row of one of several targets, its published numbers, and the verdict."""

    row: Row
    published: Row
    verdict: Verdict
    why: str

    def as_json(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        measured = self.row.model_dump()
        return {**measured, "published": self.published.metrics, "verdict": self.verdict, "why": self.why}


def find_targets(names: Sequence[str], options: Options, *, plan: bool = False) -> list[Target]:
    """Return the targets of these names, if all of them use the options that differ from the defaults.

    Args:
        names: `tiny`, `small`, `table1`, presets, systems (for their default size, or `options.size`), or `all`, which
            stands for table 1 and every preset of a published system.
        options: the options of `reproduce`.
        plan: whether a plan is wanted.

    Raises:
        UserError: a name is unknown, a preset alone was not published, or a target does not use an option.
    """
    several = are_several(names)
    targets: dict[Target, None] = {}
    for name in names:
        if name == ALL:
            published = [preset for preset in all_presets() if preset not in SHIPPED_PRESETS]
            targets |= dict.fromkeys([Target(TABLE1, "table1"), *(Target(preset, "row") for preset in published)])
        else:
            targets[_find_target(name, options.size, several)] = None
    group = "several" if several else next(iter(targets)).group
    if several and (scales := [target.name for target in targets if target.group == "scale"]):
        raise UserError(f"{scales[0]} is not a target of the paper's scale: reproduce it alone.")
    used = [field.name for field in fields(Options) if getattr(options, field.name) != field.default]
    for option in [*used, *(["plan"] if plan else [])]:
        if option in USED_BY and group not in USED_BY[option]:
            spelled = _SPELLED.get(option, f"--{option.replace('_', '-')}")
            users = [GROUPS[user] for user in USED_BY[option]]
            listed = " or ".join(users) if len(users) < 3 else f"{', '.join(users[:-1])}, or {users[-1]}"
            raise UserError(f"{spelled} goes with {listed}, not with {' '.join(names)}.")
    return list(targets)


def _find_target(name: str, size: str | None, several: bool) -> Target:
    if name in SCALES:
        return Target(name, "scale")
    if name == TABLE1:
        return Target(name, "table1")
    presets = all_presets()
    systems = dict.fromkeys(kind.name for kind, _ in presets.values())
    if name not in {*systems, *presets, *(preset.official_name for _, preset in presets.values())}:
        raise UserError(f"Unknown target {name!r}; there are {', '.join([*SCALES, TABLE1, *systems, *presets, ALL])}.")
    # Among several targets, a preset without published weights is not run. Alone, it is an error.
    found = find_preset(name) if several and name not in systems else published_preset(name, size)
    return Target(found[1].name, "row")


def reproduce(
    names: Sequence[str] = ("tiny",),
    options: Options | None = None,
    *,
    out: Path | str | None = None,
    show_progress: bool = True,
) -> list[Reproduced]:
    """Measure targets and judge every row. A run that was killed is resumed.

    Every process of a distributed run calls this function. The main process computes scores and table 1.

    Args:
        names: the names of targets, as `find_targets` takes them.
        options: the options of the user.
        out: the folder for results, tables and pictures, with a folder for each if there are several targets. By
            default it is `runs/TARGET`, `runs/TARGET-stand-in` or `runs/tables`.
        show_progress: whether to show the progress on stderr.

    Returns:
        The outcome of each target, in order. In all processes except the main one, the list is empty.

    Raises:
        UserError: `find_targets` refuses a name or an option, or the only target cannot be run.
    """
    options = Options() if options is None else options
    targets = find_targets(names, options)
    several = are_several(names)
    done = []
    for target in targets:
        reason = _why_not(target, options) if several else None
        folder = _folder(target, options, out, several)
        if several and reason is None:
            log(f"{'Stand-in of' if options.stand_in else 'Running'} {target.name}")
        try:
            found = None if reason is not None else _run(target, options, folder, show_progress)
        except (UserError, OSError) as error:  # one target's files are wrong, but the others can be run
            if not several:
                raise
            found, reason = None, str(error)
        if reason is not None:
            done.append(Reproduced(target, folder, None, {target.id: ("not run", reason)}))
        elif found is not None:
            done.append(Reproduced(target, folder, *found))
    return done if process_state().is_main_process else []


def plan(names: Sequence[str], options: Options, *, out: Path | str | None = None) -> list[Planned]:
    """Return the cost of each target and the files that it lacks. Nothing is run or downloaded."""
    found = []
    for target in find_targets(names, options, plan=True):
        values, rows = None, []
        if target.group == "table1":
            values = table1.plan(options)
            rows = table1.plan_rows(values)
        elif unpublished(find_preset(target.name)[1]) is None:
            run = table3.plan(target.name, options, out=_folder(target, options, out, are_several(names)))
            values, rows = run.as_json(), run.rows()
        found.append(Planned(target.name, target.id, _why_not(target, options), values, rows))
    return found


def outcomes(done: Sequence[Reproduced]) -> list[Outcome]:
    """Return the rows of targets at the paper's scale beside their published numbers."""
    found = []
    for each in done:
        empty = Row(id=each.target.id, label=each.target.name, metrics={})
        rows = each.results.rows if each.results is not None else []
        for row in rows or [empty.model_copy(update={"not_run": each.judged[empty.id][1]})]:
            published = Row(id=row.id, label=row.label, metrics=published_metrics(row.id))
            found.append(Outcome(row, published, *each.judged[row.id]))
    return found


def are_several(names: Sequence[str]) -> bool:
    """Return whether names stand for several targets, of which only those that can be run are run."""
    return len(set(names)) > 1 or ALL in names


def _folder(target: Target, options: Options, out: Path | str | None, several: bool) -> Path:
    if several:
        return Path("runs/tables" if out is None else out) / target.name
    stand_in = "-stand-in" if options.stand_in and target.group == "row" else ""
    return Path("runs") / f"{target.name}{stand_in}" if out is None else Path(out)


def _why_not(target: Target, options: Options) -> str | None:
    """Return why a target of the paper's scale cannot be run here; None if it can. Nothing is read or downloaded."""
    if target.group == "row" and (reason := unpublished(find_preset(target.name)[1])):
        return reason
    if options.stand_in:
        return None
    states = table1.files(options) if target.group == "table1" else table3.files(target.name, options)
    missing = [state.artifact.key for state in states if state.state == "missing"]
    if not missing:
        return None
    commands = " and ".join(f"`{command}`" for command in how_to_fetch(missing, options.folder))
    return f"missing: {', '.join(missing)}; next: {commands}"


def _run(target: Target, options: Options, out: Path, show_progress: bool) -> tuple[Results, Judged] | None:
    """Return results and verdicts; None in all processes except the main one."""
    if target.group == "row":
        return table3.reproduce_table3(target.name, options, out=out, show_progress=show_progress)
    if not process_state().is_main_process:
        return None
    if target.group == "table1":
        return table1.reproduce_table1(options, out=out)
    shipped = files.reference_folder() / target.name
    stored = shipped / "results.json"
    measured, compared = small_scale.reproduce_scale(
        find_scale(target.name, options.data),
        weights=options.weights or shipped / "weights",
        out=out,
        reference=options.reference or (stored if stored.is_file() else None),
        num_images=SMALL_SCALE_IMAGES if options.num_images is None else options.num_images,
        seed=options.seed,
    )
    return measured, verdicts(measured, compared)
