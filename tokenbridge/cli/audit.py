"""`tokenbridge audit`, `claims`, `gate` and `update-references`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenbridge.cli.options import MAX_RESAMPLES, Json, Offline, app, not_one
from tokenbridge.utils import files
from tokenbridge.utils.console import print_line, print_table
from tokenbridge.utils.errors import UserError


@app.command()
def gate(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="The parts: goldens, tiny, tokens, audit, benchmarks; all by default.", show_default=False),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out the benchmarks, and sampling in the part tiny.")
    ] = False,
    references: Annotated[
        Path | None, typer.Option(help="The folder of references to compare with; the shipped ones by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for what is made, and for junit.xml.")] = Path("runs/gate"),
) -> None:
    """Compare this code with all stored references; exit code 1 if anything changed, 2 if a part could not be run."""
    from tokenbridge.configs.scales import find_scale
    from tokenbridge.regression import gate as g

    chosen = parts or g.PARTS
    done = g.run_gate(find_scale("tiny"), references or files.reference_folder(), out, parts=chosen, quick=quick)
    g.write_junit(out / "junit.xml", done)
    g.print_parts(done)
    sys.exit(g.exit_code(done))


@app.command()
def update_references(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="The references: tiny, verdicts, benchmarks; all by default.", show_default=False),
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Replace the stored references by the measured ones.")] = False,
    why: Annotated[str, typer.Option(help="Why they change, which --write needs.")] = "",
    references: Annotated[
        Path | None, typer.Option(help="The folder of references to replace; the shipped ones by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for what is measured.")] = Path("runs/references"),
) -> None:
    """Measure the references anew and show what differs; with --write and --why, replace them and record it."""
    from tokenbridge.configs.scales import find_scale
    from tokenbridge.regression import references as r

    folder = references or files.reference_folder()
    changes = r.update(find_scale("tiny"), folder, out, parts=parts or r.PARTS, why=why if write else None)
    if changes:
        print_table("Stored references against new ones", r.COLUMNS, changes)
    else:
        print_line("No reference changed.")
    if write:
        print_line(f"{folder} is updated; the record is in {folder / r.RECORD}.")
    elif changes:
        print_line("Nothing was written.")


@app.command()
def audit(
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Result files (results.json), own or others', beside the shipped ones; those in runs/ by default.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="A folder of images, or an .npz file, to score and to judge --claim by.")
    ] = None,
    claim: Annotated[str | None, typer.Option(help="With --samples: the claim of table 3, by its id.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for the page, Markdown, JSON and JUnit XML.")] = Path(
        "runs/audit"
    ),
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            help="What gives exit code 1: worse than stored (the default), or a verdict, as 'not reproduced'.",
            show_default=False,
        ),
    ] = None,
    accept: Annotated[
        str | None, typer.Option(help="Store today's verdicts as the expected ones, for this reason.", metavar="REASON")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The folder of the models behind RESULTS; the shipped ones by default.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="The folder of the published files; $TOKENBRIDGE_ARTIFACTS by default.")
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option("--inception", "--inception-weights", help="With --samples: torch-fidelity's Inception weights."),
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="With --samples: adm_in256_stats.npz, for FID.")] = None,
    reference_batch: Annotated[
        Path | None, typer.Option(help="With --samples: VIRTUAL_imagenet256_labeled.npz, for precision and recall.")
    ] = None,
    other_inception: Annotated[
        Path | None, typer.Option(help="With --samples: other Inception weights; scores are labelled, decide nothing.")
    ] = None,
    num_bootstrap: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MAX_RESAMPLES,
            callback=not_one,
            help="With --samples: the number of resamples behind FID's interval; 100 by default.",
        ),
    ] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Judge every published number by what was measured: verdicts, evidence, a page; exit code 1 if the gate fails."""
    from tokenbridge.audit.audit import run_audit
    from tokenbridge.results.markdown import cell

    of_samples = {
        "inception": inception,
        "reference": reference,
        "reference-batch": reference_batch,
        "other-inception": other_inception,
        "num-bootstrap": num_bootstrap,
    }
    if samples is None and (alone := [f"--{name}" for name, value in of_samples.items() if value is not None]):
        raise UserError(f"{' and '.join(alone)} can be used only with --samples.")
    if samples is not None and weights is not None:
        raise UserError("--weights can be used only without --samples.")
    done = run_audit(
        results or [],
        samples=samples,
        claim=claim,
        out=out,
        accept=accept,
        weights=weights,
        folder=folder,
        fail_on=fail_on or (),
        given={"inception": inception, "adm-statistics": reference, "adm-reference": reference_batch},
        other_inception=other_inception,
        num_bootstrap=100 if num_bootstrap is None else num_bootstrap,
    )
    if as_json:
        print(json.dumps(done.model_dump(mode="json"), indent=2))
    else:
        if samples is not None:
            (row,) = done.evidence[-1].rows
            print_table(f"Scores of {samples}", ["", row.label], [[name, cell(row, name)] for name in row.metrics])
        _print_audit(done, out)
    if done.failures:
        sys.exit(1)


@app.command()
def claims(
    prefix: Annotated[
        str, typer.Argument(help="Only claims whose ids begin so, as 'table3' or 'table2c/64'.", show_default=False)
    ] = "",
    as_json: Json = False,
) -> None:
    """List the published claims by their ids, with what was published; with --json also how each is measured."""
    from tokenbridge.results.ledger import read_ledger

    found = [claim for claim in read_ledger(files.reference_folder() / "paper").claims if claim.id.startswith(prefix)]
    if not found:
        raise UserError(f"No claim has an id that begins with {prefix!r}; `tokenbridge claims` lists all of them.")
    if as_json:
        print(json.dumps([claim.model_dump(mode="json") for claim in found], indent=2))
        return
    rows = [[c.id, "" if c.value is None else f"{c.value:,.12g}{c.unit}", c.text] for c in found]
    print_table("Published claims", ["id", "published", "what"], rows)


def _print_audit(done: Any, out: Path) -> None:
    from tokenbridge.audit.report import counts, lines_of

    print_table("Published claims", ["verdict", "claims"], [[verdict, str(n)] for verdict, n in counts(done).items()])
    for evidence in done.evidence:
        print_line(f"Evidence: {evidence.file}: {'; '.join(evidence.notes)}.")
    for line in lines_of(done, ("not reproduced", "within doubt")):
        print_line(line)
    for failure in done.failures:
        print_line(f"The gate fails: {failure}", style="bold red")
    print_line(f"The page is {out}/index.html.")
