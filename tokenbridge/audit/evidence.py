"""Result files as evidence: they are found, checked against the files on this machine, and chosen from."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokenbridge.audit.findings import Origin
from tokenbridge.audit.paper import contradiction, known_hashes, parts_of
from tokenbridge.configs.scales import SCALES
from tokenbridge.data.sources import load_images
from tokenbridge.models.registry import all_presets
from tokenbridge.reproduction import table3
from tokenbridge.reproduction.discrepancies import run as discrepancies
from tokenbridge.reproduction.trends import trends as trends_of
from tokenbridge.results import schema as result_files
from tokenbridge.results.compare import compare, incomparable, verdicts
from tokenbridge.results.schema import Results, Trend
from tokenbridge.utils import files, provenance
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import sha256_of
from tokenbridge.weights.artifacts import ARTIFACTS, INCEPTION

RUNS = ("tiny", "small", "discrepancies", "table1", *all_presets())  # folders to which the commands write by default


@dataclass(frozen=True)
class Source:
    """A result file that was read and checked."""

    name: str  # the name that the audit shows
    path: Path
    origin: Origin
    results: Results
    trends: tuple[Trend, ...] = ()
    notes: tuple[str, ...] = ()
    known: Mapping[str, str | None] = field(default_factory=dict)  # scale "paper": see `paper.known_hashes`
    # Of the user's files at a small scale: rows and trends that are not the shipped ones, by their ids, and why.
    unlike: Mapping[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> set[str]:
        """The rows that were run."""
        return {row.id for row in self.results.rows if row.not_run is None}

    def overlaps(self, other: Source) -> bool:
        """Return whether both files measured a row at the same scale."""
        return self.results.scale == other.results.scale and bool(self.measured & other.measured)

    def noted(self, *notes: str) -> Source:
        """Return the same file with more notes."""
        return replace(self, notes=(*self.notes, *notes))


def gather(
    results: Sequence[Path | str],
    *,
    runs: Path,
    weights: Path | str | None = None,
    folder: Path | str | None = None,
    scored: bool = False,
) -> list[Source]:
    """Read and check the shipped result files and those of the user; see `audit.audit_claims` for the arguments.

    Raises:
        UserError: a file is refused; the message says why.
    """
    shipped = files.reference_folder()
    paths: list[tuple[Path, Origin]] = []
    paths += [(path, "shipped") for path in sorted(shipped.glob("*/results.json"))]
    if results:
        paths += [(Path(path), "scored" if scored else "given") for path in results]
    else:
        found = (folder / name / "results.json" for folder in (runs, runs / "tables") for name in RUNS)
        paths += [(path, "found") for path in found if path.is_file()]
    sources = []
    for path, origin in paths:
        name = f"reference_results/{path.relative_to(shipped)}" if origin == "shipped" else str(path)
        read = result_files.read(path)
        folders = [Path(weights)] if weights is not None and origin != "shipped" else []
        known = known_hashes(read, folder) if read.scale == "paper" else {}
        notes = check_hashes(name, read, [*folders, shipped / read.scale / "weights"], known)
        if read.scale not in SCALES and (reason := incomparable(read, table3.NUM_IMAGES)) is not None:
            notes.append(f"decides no number of the paper: {reason}")
        sources.append(Source(name, path, origin, read, tuple(recomputed_trends(name, read)), tuple(notes), known))
    return sources


def check_hashes(
    name: str, results: Results, folders: Sequence[Path], published: Mapping[str, str | None]
) -> list[str]:
    """Compare the hashes in a result file with the files on this machine; return what was and what was not compared.

    Args:
        name: the name of the result file, for messages.
        folders: the folders of models of its scale.
        published: the SHA-256 of published files; see `paper.known_hashes`.

    Raises:
        UserError: a hash differs; results of a scale of this project name other images than its own or no weights; or
            results of the paper's scale contradict themselves.
    """
    p = results.provenance
    origins: list[str] = []
    if results.scale in SCALES:
        if outside := [n for n in p.weights_sha256 if Path(n).is_absolute() or ".." in Path(n).parts]:
            raise UserError(f"{name} names weights outside of the folder of its models: {outside[0][:80]!r}.")
        known = {n: {sha256_of(f / n) for f in folders if (f / n).is_file()} for n in p.weights_sha256}
        if not known:
            raise UserError(f"{name} does not say what weights it was measured with.")
        if any(f.is_dir() for f in folders) and not any(known.values()):
            raise UserError(f"{name} was measured with weights that are not on this machine: {', '.join(known)}.")
        where = ", ".join(str(f) for f in folders)
        hint = f"has another SHA-256 in {where}; if results are of other weights, name their folder with --weights"
        named = dict(p.weights_sha256)
        data = SCALES[results.scale].data
        for split in (f"{data}/{part}" for part in ("train", "test")):
            if split not in p.data_sha256:
                raise UserError(f"{name} was not measured on the images of its scale: it names no {split}.")
            named[split] = p.data_sha256[split]
            known[split] = {_hash_of_images(data, split.rpartition("/")[2])} if data == "digits" else set()
    elif results.scale == "paper":
        if (wrong := contradiction(results)) is not None:
            raise UserError(f"{name} cannot be right: {wrong}.")
        if p.settings.get("published Inception weights") and INCEPTION not in p.weights_sha256:
            raise UserError(f"{name} does not say what Inception weights it was measured with.")
        parts = [part for row in results.rows for part in parts_of(results, row.id, "", published)]
        if not p.settings.get("published Inception weights"):
            parts = [part for part in parts if part.key != INCEPTION]
        named = {part.name: part.sha256 for part in parts if part.name is not None and part.sha256 is not None}
        known = {n: {h for part in parts if part.name == n and (h := published[part.key])} for n in named}
        hint = (
            "is published, or was recorded here, with another SHA-256 (a converted folder has hashes of its own: "
            "reproduce from the published file)"
        )
        for words, of_publisher in (("of a published hash", True), ("recorded here, no hash was published", False)):
            names = [
                n
                for part in parts
                if (n := part.name) in known and known[n] and ARTIFACTS[part.key].has_published_hash is of_publisher
            ]
            origins += [f"{words}: {', '.join(dict.fromkeys(names))}"] * bool(names)
    else:
        return []
    for part, sha256 in named.items():
        if known[part] and sha256 not in known[part]:
            raise UserError(f"{name} was measured with {part} of SHA-256 {sha256[:16]}…, which {hint}.")
    compared = sum(bool(known[part]) for part in named)
    absent = [part for part in named if not known[part]]
    notes = [f"{compared} hashes of weights and images compared with the files here", *origins]
    return notes + ([f"not here to compare: {', '.join(absent)}"] if absent else [])


def recomputed_trends(name: str, results: Results) -> list[Trend]:
    """Return the trends that follow from the rows of a result file.

    Raises:
        UserError: a stored trend differs from the computed one, or rows lack a metric that a trend needs.
    """
    found: list[Trend] = []
    if results.scale in SCALES:
        try:
            found += trends_of(results.rows)
            found += discrepancies.trends(results.rows, SCALES[results.scale].extractor)
        except (KeyError, StopIteration, ZeroDivisionError) as error:
            raise UserError(f"{name}: its rows lack metrics that its trends rest on ({error!r}).") from error
    by_id = {trend.id: trend for trend in found}
    for stored in results.trends:
        again = by_id.get(stored.id)
        if again is None or _numbers(again) != _numbers(stored):
            follows = "nothing" if again is None else " ".join(map(str, _numbers(again)))
            stated = " ".join(map(str, _numbers(stored)))
            raise UserError(f"{name}: the trend {stored.id} says {stated}, but from the rows follows {follows}.")
    return found


def choose(sources: Iterable[Source]) -> tuple[list[Source], list[str]]:
    """Return the files to judge by, and a sentence for each row that differs from the shipped row it replaces.

    Raises:
        UserError: two files of the user measured the same row at the same scale.
    """
    order = {"shipped": 0, "scored": 1, "given": 1, "found": 2}
    found: list[Source] = []
    for source in sorted(sources, key=lambda s: (order[s.origin], s.results.scale, s.name)):
        if not any(source.results == other.results for other in found):  # equal contents are a copy of the same file
            found.append(source)
    shipped = [s for s in found if s.origin == "shipped"]
    kept: list[Source] = []
    regressions: list[str] = []
    replaced: set[str] = set()
    ignored: dict[str, list[str]] = {}
    for source in (s for s in found if s.origin != "shipped"):
        stood_for = [s for s in shipped if s.overlaps(source)]
        older = [s for s in stood_for if source.results.provenance.started < s.results.provenance.started]
        if source.origin == "found" and older:
            ignored.setdefault(older[0].name, []).append(f"{source.name} is older and was left out")
            continue
        for other in stood_for:
            replaced.add(other.name)
            source = source.noted(f"stands in for {other.name}")
            judged = verdicts(source.results, other.results)
            regressions += [
                f"{source.name}: {id_} is not that of {other.name}: {why}"
                for id_, (verdict, why) in judged.items()
                if verdict == "not reproduced"
            ]
        kept.append(replace(source, unlike=_unlike(source, shipped)))
    for first, second in itertools.combinations(kept, 2):
        if first.overlaps(second) and first.results.scale in ("paper", *SCALES):
            both = ", ".join(sorted(first.measured & second.measured)[:3])
            raise UserError(
                f"{first.name} and {second.name} both measured {both} at scale {first.results.scale}: name the one "
                "that is meant."
            )
    remaining = [s.noted(*ignored.get(s.name, ())) for s in shipped if s.name not in replaced]
    return [*remaining, *kept], regressions


def _unlike(source: Source, shipped: Sequence[Source]) -> dict[str, str]:
    """Return the rows and trends of a file that are not those of the shipped files of its scale, and why."""
    stored = [other for other in shipped if other.results.scale == source.results.scale]
    rows = {row.id: row for other in stored for row in other.results.rows}
    holds = {trend.id: trend.holds for other in stored for trend in other.trends}
    judged = {row.id: compare(row, rows.get(row.id)) for row in source.results.rows}
    return {id_: why for id_, (verdict, why) in judged.items() if verdict == "not reproduced"} | {
        trend.id: "the shipped rows do not say so" for trend in source.trends if holds.get(trend.id) is not trend.holds
    }


def _numbers(trend: Trend) -> tuple[float, str, float]:
    return trend.measured, trend.relation, trend.bound


@functools.cache
def _hash_of_images(data: str, split: str) -> str:
    return provenance.hash_of_dataset(load_images(data, split))
