"""All that can be rebuilt of the paper's tables at its own scale: table 1, and a row of table 3 for every preset.

What has its files is run, one after another, each into a folder of its own with its full results; the rest is listed
as not run, with the reason. Nothing is downloaded here: weights of all systems are some 50 GB, of which a user fetches
what they want (`tokenbridge artifacts KEY... --download`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenbridge.models.registry import SHIPPED_PRESETS, all_presets, find_preset, unpublished
from tokenbridge.reproduction import table1, table3
from tokenbridge.reproduction.table3 import Options, published_row
from tokenbridge.results.compare import Judged
from tokenbridge.results.schema import Results, Row
from tokenbridge.results.verdicts import Verdict
from tokenbridge.utils.console import log
from tokenbridge.utils.devices import process_state
from tokenbridge.utils.errors import UserError
from tokenbridge.weights import artifacts

TABLE1 = "table1"


@dataclass(frozen=True)
class Outcome:
    """A row, what was published of it, and the verdict."""

    row: Row
    published: Row
    verdict: Verdict
    why: str

    def as_json(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        return {
            **self.row.model_dump(),
            "published": self.published.metrics,
            "verdict": self.verdict,
            "why": self.why,
        }


def all_names() -> list[str]:
    """Return what there is to reproduce: table 1, and every preset of every system but this project's own."""
    return [TABLE1, *(name for name in all_presets() if name not in SHIPPED_PRESETS)]


def check_names(names: Iterable[str]) -> list[str]:
    """Return names as `all_names` has them; all of them if there are none.

    Raises:
        ValueError: an unknown name.
    """
    return [name if name == TABLE1 else find_preset(name)[1].name for name in names] or all_names()


def why_not(name: str, options: Options, folder: Path | str | None = None) -> str | None:
    """Return why a row cannot be run here; None if it can. Nothing is read or downloaded.

    Raises:
        ValueError: a folder that is not there.
    """
    if name == TABLE1:
        keys: Sequence[str] = table1.FILES
    elif reason := unpublished(find_preset(name)[1]):
        return reason
    else:
        keys = table3.needed_files(name, options)
    missing = [s.artifact.key for s in artifacts.status(keys, folder=folder) if s.state == "missing"]
    return f"missing: {', '.join(missing)} (`tokenbridge artifacts` says where from)" if missing else None


def reproduce_tables(
    names: Sequence[str],
    options: Options,
    *,
    out: Path | str,
    folder: Path | str | None = None,
    show_progress: bool = True,
) -> list[Outcome]:
    """Run what can be run; a run that was killed goes on where it was.

    Every process of a distributed run calls this; the main one scores, and makes table 1.

    Args:
        names: of `all_names`.
        options: of the rows of table 3.
        out: each row's results go to a folder of it.
        folder: see `artifacts.resolve`.
        show_progress: on stderr.

    Returns:
        The outcomes, in order; in all processes but the main one, of what was not run alone.
    """
    outcomes: list[Outcome] = []
    for name in names:
        reason = why_not(name, options, folder)
        if reason is None:
            log(f"Running {name}")
            try:
                outcomes += _run(name, options, Path(out) / name, folder, show_progress)
                continue
            except UserError as error:  # of one row's files; the others can be run
                reason = str(error)
        outcomes.append(_not_run(name, reason))
    return outcomes


def stand_in_tables(
    names: Sequence[str], options: Options, *, out: Path | str, show_progress: bool = True
) -> list[Outcome]:
    """Run full-size stand-ins (see `table3.stand_in`) of all that could be reproduced with files: no result."""
    outcomes: list[Outcome] = []
    for name in names:
        if name != TABLE1 and (reason := unpublished(find_preset(name)[1])):
            outcomes.append(_not_run(name, reason))
            continue
        log(f"Stand-in of {name}")
        if name != TABLE1:
            done = table3.stand_in(name, options, out=Path(out) / name, show_progress=show_progress)
        elif process_state().is_main_process:
            done = table1.stand_in(out=Path(out) / name)
        else:
            done = None
        outcomes += _outcomes(name, done)
    return outcomes


def plan_tables(
    names: Sequence[str], options: Options, *, out: Path | str, folder: Path | str | None = None
) -> list[dict[str, Any]]:
    """Return, as JSON values, what each row takes and what is missing for it; nothing is run or downloaded."""
    planned: list[dict[str, Any]] = []
    for name in names:
        entry: dict[str, Any] = {"id": _id(name), "not_run": why_not(name, options, folder)}
        if name == TABLE1:
            entry["plan"] = table1.plan(folder=folder)
        elif unpublished(find_preset(name)[1]) is None:
            entry["plan"] = table3.plan(name, options, out=Path(out) / name, folder=folder).as_json()
        planned.append(entry)
    return planned


def _run(name: str, options: Options, out: Path, folder: Path | str | None, show_progress: bool) -> list[Outcome]:
    if name != TABLE1:
        done = table3.reproduce_table3(name, options, out=out, folder=folder, show_progress=show_progress)
    elif process_state().is_main_process:
        done = table1.reproduce_table1(out=out, folder=folder)
    else:
        done = None
    return _outcomes(name, done)


def _outcomes(name: str, done: tuple[Results, Judged] | None) -> list[Outcome]:
    if done is None:
        return []
    results, judged = done
    return [Outcome(row, _published(name, row.id), *judged[row.id]) for row in results.rows]


def _not_run(name: str, reason: str) -> Outcome:
    row = Row(id=_id(name), label=name, metrics={}, not_run=reason)
    return Outcome(row, _published(name, row.id), "not run", reason)


def _id(name: str) -> str:
    return TABLE1 if name == TABLE1 else f"table3/{name}"


def _published(name: str, row_id: str) -> Row:
    if name != TABLE1:
        return published_row(find_preset(name)[1])
    empty = Row(id=row_id, label=name, metrics={})
    return next((recipe.published for recipe in table1.RECIPES if recipe.id == row_id), empty)
