"""Update the stored references: measure them again, show what differs, and record who replaced them, when and why.

Golden cases are never updated, because they are numbers of the official code.
"""

from __future__ import annotations

import datetime
import functools
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tokenbridge.audit.expected import read_expected, write_expected
from tokenbridge.regression import gate, ratios
from tokenbridge.reproduction.small_scale import reproduce_scale
from tokenbridge.results import compare, markdown, tolerances, verdicts
from tokenbridge.results import schema as results
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import HIDDEN, make_folder, recover, replacing_folder, write_text
from tokenbridge.utils.locks import locked

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tokenbridge.audit.expected import Expected
    from tokenbridge.audit.findings import Audit
    from tokenbridge.configs.schema import Scale
    from tokenbridge.regression.ratios import Ratios
    from tokenbridge.results.schema import Results

PARTS = ("tiny", "verdicts", "benchmarks")
EXPECTED = "paper/expected.json"
RECORD = "CHANGES.md"
ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("what", "stored", "measured", "")

Change = tuple[str, str, str, str]  # `COLUMNS`


def update(
    scale: Scale,
    folder: Path | str,
    out: Path | str,
    *,
    parts: Sequence[str] = PARTS,
    why: str | None = None,
    source: Path = ROOT,
) -> list[Change]:
    """Measure references again and return what differs; replace the stored ones if a reason is given.

    The new references appear all at once. If the process is killed before, the old ones are unchanged.

    Args:
        scale: the scale of the part `tiny`.
        folder: the references, `reference_results/`.
        out: the folder for what is measured.
        parts: names in `PARTS`.
        why: the reason, which goes to the record and to claims that were reproduced before and are not now. None
            writes nothing.
        source: the checkout of the code that measures.

    Raises:
        UserError: a part is unknown, the reason is empty, or references are to be written and the checkout has
            uncommitted changes, or somebody else is updating them.
    """
    folder, out = Path(folder), Path(out)
    if unknown := sorted(set(parts) - set(PARTS)):
        raise UserError(f"There are no references {', '.join(unknown)}; there are {', '.join(PARTS)}.")
    if why is not None and not why.strip():
        raise UserError("References change for a reason: say it with --why.")
    recover(folder)
    with locked(folder) if why is not None else nullcontext():  # what is read must be what is replaced
        make_folder(out)
        commit = None if why is None else clean_commit(source)  # checked first, since measuring takes minutes
        changes: list[Change] = []
        fresh: dict[str, Path] = {}  # new files by their names in `folder`
        if "tiny" in parts:
            made, changed = _measure_tiny(scale, folder / scale.name, out / scale.name)
            fresh |= {f"{scale.name}/{path.name}": path for path in made}
            changes += changed
        audit = None
        if "verdicts" in parts:
            audit = gate.audit_of(folder, out / scale.name if "tiny" in parts else None, fail_on=())
            expected = read_expected(folder / EXPECTED) if (folder / EXPECTED).is_file() else {}
            changes += verdict_changes(audit, expected)
        if "benchmarks" in parts:
            name = "benchmarks/ratios.json"
            measured = functools.reduce(ratios.merge, (ratios.measure() for _ in range(ratios.NUM_RUNS)))
            if measured.failed:
                raise UserError(f"These benchmarks fail, and cannot become references: {', '.join(measured.failed)}.")
            stored = ratios.read(folder / name) if (folder / name).is_file() else None
            changes += ratio_changes(measured, stored)
            ratios.write(out / name, measured)
            fresh[name] = out / name
        if why is not None:
            if clean_commit(source) != commit:
                raise UserError("The checkout changed during the measurement; nothing was written.")
            record = _record(why.strip(), str(commit), _who(source), changes)
            with replacing_folder(folder, known=None) as new:
                shutil.copytree(folder, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(HIDDEN))
                for name, path in fresh.items():
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, new / name)
                if audit is not None:
                    write_expected(new / EXPECTED, audit, why.strip())
                before = (new / RECORD).read_text(encoding="utf-8") if (new / RECORD).is_file() else _TITLE
                write_text(new / RECORD, before + record)
        return changes


def clean_commit(source: Path) -> str:
    """Return the commit of a checkout.

    Raises:
        UserError: it has uncommitted changes, or is not a git checkout.
    """
    hidden = (HIDDEN, f"{HIDDEN}/**")
    try:
        if changed := _git(source, "status", "--porcelain", "--", ".", *(f":(exclude,glob)**/{h}" for h in hidden)):
            first = changed.splitlines()[0].split(maxsplit=1)[1]
            raise UserError(f"{source} has uncommitted changes ({first}, ...): no reference can be measured there.")
        return _git(source, "rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{source} is not a git checkout: no reference can be measured there.") from error


def _git(source: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True, check=True)  # noqa: S603, S607
    return done.stdout.strip()


def _who(source: Path) -> str:
    """Return git's user as `Name <email>`."""
    try:
        return f"{_git(source, 'config', 'user.name')} <{_git(source, 'config', 'user.email')}>"
    except subprocess.CalledProcessError as error:
        raise UserError("git has no user.name or no user.email to record.") from error


def _measure_tiny(scale: Scale, folder: Path, out: Path) -> tuple[list[Path], list[Change]]:
    """Measure tiny results; return the new files, and what differs from the stored results and tokens."""
    stored = results.read(folder / "results.json") if (folder / "results.json").is_file() else None
    measured, _ = reproduce_scale(
        scale,
        weights=folder / "weights",
        out=out,
        reference=None if stored is None else folder / "results.json",
    )
    judged = compare.verdicts(measured, stored)
    if any(verdict == "not reproduced" for verdict, _ in judged.values()):
        # The page of new references does not judge them by the old ones.
        write_text(out / "tables.md", markdown.to_markdown(measured, None))
    changes = [*result_changes(measured, stored)]
    new = gate.read_tokens(out / "tokens.json")
    old = gate.read_tokens(folder / "tokens.json") if (folder / "tokens.json").is_file() else {}
    for name in dict.fromkeys([*old, *new]):
        if name not in old or name not in new:
            changes.append((f"tokens {name}", *_presence(name in old, name in new), "changed"))
        elif (share := gate.share_equal(new[name], old[name])) < 1:
            changes.append((f"tokens {name}", "", f"{share:.1%} equal", _word(share >= gate.SHARE_OF_TOKENS)))
    return sorted(path for path in out.iterdir() if path.is_file()), changes


def result_changes(measured: Results, stored: Results | None) -> Iterator[Change]:
    """Yield every row, metric and trend that differs, except times, which depend on the machine."""
    old, new = ({row.id: row for row in r.rows} if r is not None else {} for r in (stored, measured))
    for id_ in dict.fromkeys([*old, *new]):
        before, after = ({} if row is None else row.metrics for row in (old.get(id_), new.get(id_)))
        if not before or not after:
            if before or after:
                yield id_, *_presence(bool(before), bool(after)), "changed"
            continue
        for name in dict.fromkeys([*before, *after]):
            if name not in before or name not in after:
                yield f"{id_} {name}", *_presence(name in before, name in after), "changed"
            elif before[name] != after[name] and tolerances.metric(name).is_compared:
                good = verdicts.within(name, after[name], before[name])
                yield f"{id_} {name}", f"{before[name]:.6g}", f"{after[name]:.6g}", _word(good)
    held, holds = ({t.id: t.holds for t in r.trends} if r is not None else {} for r in (stored, measured))
    for id_ in dict.fromkeys([*held, *holds]):
        if held.get(id_) != holds.get(id_):
            words = {True: "holds", False: "does not hold", None: "–"}
            yield f"trend {id_}", words[held.get(id_)], words[holds.get(id_)], "changed"


def ratio_changes(measured: Ratios, stored: Ratios | None) -> list[Change]:
    """Return the stored and the measured ratio of every benchmark, each the median of its runs."""
    old = {} if stored is None else stored.ratios
    changes = []
    for name in dict.fromkeys([*old, *measured.ratios]):
        before, after = old.get(name), measured.ratios.get(name)
        words = ["–" if r is None else f"{r.middle:.2f}x" for r in (before, after)]
        kept = ratios.compare(after, before)[0] and ratios.compare(before, after)[0]  # neither fell nor rose much
        changes.append((name, words[0], words[1], _word(kept)))
    return changes


def verdict_changes(audit: Audit, expected: Mapping[str, Expected]) -> Iterator[Change]:
    """Yield every claim whose verdict differs from the stored one."""
    for finding in audit.findings:
        id_, verdict = finding.claim.id, finding.verdict
        if id_ not in expected:
            yield id_, "–", verdict, "changed"
        elif (stored := expected[id_].verdict) != verdict:
            yield id_, stored, verdict, "worse" if verdicts.is_worse(verdict, stored) else "changed"
    for id_ in sorted(expected.keys() - {finding.claim.id for finding in audit.findings}):
        yield id_, expected[id_].verdict, "–", "changed"


def _presence(before: bool, after: bool) -> tuple[str, str]:
    return "there" if before else "–", "there" if after else "–"


def _word(good: bool) -> str:
    return "within tolerance" if good else "changed"


_TITLE = """# Changes of the references

`nox -s update_references` appends here; newest last.
"""


def _record(why: str, commit: str, who: str, changes: Sequence[Change]) -> str:
    """Return the section that the record gains: when, who, why, the commit that was measured, and what differs."""
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    cells = [[markdown.escape(cell) for cell in change] for change in changes]
    table = markdown.markdown_table(COLUMNS, cells) if changes else ["No number changed."]
    return "\n".join(["", f"## {when}", "", f"{who}, measured at commit {commit}: {why}", "", *table, ""])
