"""The ledger of published claims: complete against the list of facts, and every name in it leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from published import published_numbers

from tokenbridge.audit.checks import all_checks
from tokenbridge.audit.expected import read_expected
from tokenbridge.models.registry import all_presets, published_preset
from tokenbridge.reproduction import table1
from tokenbridge.reproduction.listing import list_presets
from tokenbridge.reproduction.trends import trend_rows
from tokenbridge.results.ledger import Claim, published_metrics, read_ledger
from tokenbridge.results.schema import read
from tokenbridge.results.tolerances import METRICS, metric
from tokenbridge.utils.files import reference_folder
from tokenbridge.weights.artifacts import ARTIFACTS

PAPER = reference_folder() / "paper"
LEDGER = read_ledger(PAPER)
CLAIMS = {claim.id: claim for claim in LEDGER.claims}
CHECKS = all_checks(LEDGER)
NOXFILE = (ROOT / "noxfile.py").read_text()
SESSIONS = set(re.findall(r'@nox\.session\(name="(\w+)"\)', NOXFILE)) | set(
    re.findall(r"@nox\.session\ndef (\w+)\(", NOXFILE)
)
SYSTEMS = {"LlamaGen-3B": "llamagen-3b-384", "GIVT": "givt-causal-256"}  # rows of table 3 by their presets
COLUMNS = {"gFID": "fid", "FID": "fid", "rFID": "rfid", "IS": "is"}
COUNTED = {
    "tokenbridge_base": "tokenbridge-b",
    "tokenbridge_large": "tokenbridge-l",
    "tokenbridge_huge": "tokenbridge-h",
}
COUNTED |= {"mar_base": "mar-b", "mar_large": "mar-l", "mar_huge": "mar-h", "kl16_vae": "kl16", "givt_vae": "givt-vae"}
COUNTED |= {"llamagen_vq16": "llamagen-vq16", "givt_causal_256": "givt-causal-256"}


def facts() -> dict[str, float]:
    """Return every number of the list of facts, by the id that its claim should have."""
    tables = published_numbers()
    found: dict[str, float] = {}

    def add(table: str, row: str, columns: list[str], values: list[Any]) -> None:
        for column, value in zip(columns, values, strict=True):
            if isinstance(value, int | float):
                found[f"{table}/{row}/{COLUMNS.get(column, column)}"] = value

    def rows(name: str) -> list[tuple[list[str], list[Any]]]:
        return [(tables[name]["columns"], row) for row in tables[name]["rows"]]

    for columns, row in rows("table_1a"):
        add("table1a", "vae" if row[0] == "VAE" else f"ptq-{row[1]}", columns[2:], row[2:])
    for columns, row in rows("table_1b"):
        add("table1b", "vae" if row[0] == "VAE" else f"range-{row[1]}", columns[2:], row[2:])
    for part in "abcd":
        for columns, row in rows(f"table_2{part}"):
            add(f"table2{part}", str(row[0]), columns[1:], row[1:])
    for columns, row in rows("table_2e"):
        add("table2e", f"{row[0]}x{row[1]}", columns[2:], row[2:])
    for columns, row in rows("table_3"):
        name = SYSTEMS.get(row[4], row[4].lower().replace("/", "-"))
        add("table3", name, columns[5:], row[5:])
    training, sampling = tables["table_4"]["training"], tables["table_4"]["sampling"]
    betas = training.pop("betas")
    training |= {"beta_1": betas[0], "beta_2": betas[1]}
    for key, value in training.items():
        if not isinstance(value, str):
            found[f"table4/training/{key.replace('_', '-')}"] = value
    for size, settings in sampling.items():
        found |= {f"table4/sampling/{size.lower()}-{key}": value for key, value in settings.items()}
    (_, mar, _), (_, tokenbridge, _) = tables["table_5"]["rows"]
    found |= {"table5/mar/ms": mar, "table5/tokenbridge/ms": tokenbridge, "table5/speed-up": 5.94}
    for name, counts in tables["counted"].items():
        for key, value in counts.items():
            if name == "llamagen":
                sizes = ("256", "384") if key != "XXXL" else ("",)
                found |= {f"counted/llamagen-{key.lower()}{s and f'-{s}'}": value for s in sizes}
            else:
                found[f"counted/{COUNTED[name]}" + ("" if key == "total" else f"-{key}")] = value
    commands = tables["official_commands"]
    for name in ("mar_base", "mar_large", "mar_huge"):
        found |= {f"readme/{COUNTED[name]}/{COLUMNS.get(k, k)}": commands[name][k] for k in ("FID", "IS", "params")}
    for size, value in commands["llamagen_others"].items():
        found[f"readme/llamagen-{size.lower().replace('_', '-')}/fid"] = value
    for name, value in commands["llamagen_tokenizer_rfid"].items():
        found[f"readme/llamagen-{name.replace('_', '-')}/rfid"] = value
    found["readme/llamagen-3b-384/fid"] = commands["llamagen_3b"]["FID"]
    found["readme/givt-causal-256/fid"] = commands["givt_causal"]["FID"]
    found["readme/givt-maskgit-256/fid"] = commands["givt_maskgit"]["FID"]
    return found


def test_every_published_number_has_its_claim() -> None:
    expected = facts()
    assert len(expected) > 200
    missing = sorted(expected.keys() - CLAIMS.keys())
    assert missing == []
    wrong = {id_: (CLAIMS[id_].value, value) for id_, value in expected.items() if CLAIMS[id_].value != value}
    assert wrong == {}


def test_models_are_listed_with_the_published_numbers() -> None:
    expected = facts()
    for listing in list_presets():
        if listing.name == "tokenbridge-tiny":  # our own
            assert listing.published == {}
            continue
        assert listing.num_parameters == expected[f"counted/{listing.name}"]
        scores: dict[str, set[float]] = {}
        for score in ("FID", "IS", "precision", "recall"):
            for table in ("table3", "readme"):
                if (value := expected.get(f"{table}/{listing.name}/{score.lower()}")) is not None:
                    scores.setdefault(score, set()).add(value)
        assert {score: {value} for score, value in listing.published.items()} == scores


def test_sources_agree_on_a_row() -> None:
    """The paper's table and a README give one number to a system, so it does not matter which is shown."""
    for claim in LEDGER.claims:
        if claim.row is not None and claim.metric is not None:
            assert published_metrics(claim.row)[claim.metric] == claim.value
    assert published_metrics("table3/nothing") == {}


@pytest.mark.parametrize("claim", LEDGER.claims, ids=lambda claim: claim.id)
def test_every_name_leads_somewhere(claim: Claim) -> None:
    assert claim.text
    assert claim.source
    runs_nowhere = claim.recipe.startswith("none here")
    assert runs_nowhere or claim.not_applicable is None
    assert set(claim.needs) <= ARTIFACTS.keys()
    assert set(claim.supported_by) <= trend_rows().keys()
    if claim.scale == "counted":
        assert claim.check in CHECKS
        assert claim.recipe == "tokenbridge audit"
    elif claim.scale == "tiny":
        assert claim.trend in trend_rows()
        assert claim.recipe == "nox -s reproduce_tiny"
    else:
        assert claim.row is not None
        assert claim.value is not None
        if not runs_nowhere:
            leads_to_its_row(claim)


def leads_to_its_row(claim: Claim) -> None:
    """A claim that could be measured names the session that makes its row, a known metric, and what it needs."""
    assert metric(str(claim.metric)).relative < float("inf")
    assert claim.tolerance is not None
    assert claim.tolerance.reason
    assert claim.needs
    match = re.fullmatch(r"nox -s (\w+)(?: -- --size (\S+))?", claim.recipe)
    assert match
    session, size = match.groups()
    assert session in SESSIONS
    if session == "reproduce_table1":
        assert claim.row in {recipe.id for recipe in table1.RECIPES}
        return
    named = {"reproduce_L": "tokenbridge-l", "reproduce_H": "tokenbridge-h"}.get(session)
    if named is not None:
        assert claim.row == f"table3/{named}"
        return
    system = session.removeprefix("reproduce_")
    preset = claim.row.removeprefix("table3/") if claim.row else ""
    if all_presets()[preset][1].sampling:
        assert published_preset(system, size)[1].name == preset
    else:
        with pytest.raises(ValueError, match="settings"):  # LlamaGen's L at 256 pixels
            published_preset(system, size)


def test_every_discrepancy_is_measured_or_says_why_not() -> None:
    rows = {row.id for row in read(reference_folder() / "discrepancies" / "results.json").rows}
    for discrepancy in LEDGER.discrepancies:
        assert set(discrepancy.rows) <= rows, discrepancy.id
        assert set(discrepancy.checks) <= CHECKS.keys(), discrepancy.id
        assert bool(discrepancy.rows or discrepancy.checks) != (discrepancy.not_measured is not None), discrepancy.id
        words = f"{discrepancy.text} {discrepancy.not_measured}"
        assert all((ROOT / test).is_file() for test in re.findall(r"tests/\S+\.py", words)), discrepancy.id
    named = {row for discrepancy in LEDGER.discrepancies for row in discrepancy.rows}
    assert rows == named  # what is measured is shown


def test_every_claim_has_a_stored_verdict() -> None:
    assert read_expected(PAPER / "expected.json").keys() == CLAIMS.keys()


def test_a_claim_is_granted_what_its_metric_is() -> None:
    claim = CLAIMS["table3/tokenbridge-l/fid"]
    assert claim.tolerance is not None
    fid = METRICS["FID-50K"]
    assert claim.tolerance.of(1.76) == pytest.approx(fid.absolute + fid.relative * 1.76)
    assert claim.tolerance.reason == fid.reason
    assert CLAIMS["table5/mar/ms"].tolerance is None  # a time


GOOD = {"id": "a/b/c", "text": "t", "source": "s", "scale": "counted", "recipe": "tokenbridge audit", "check": "x"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"claims": [{**GOOD, "valeu": 1.0}]}, "Extra inputs"),
        ({"claims": [{**GOOD, "scale": "big"}]}, "scale"),
        ({"claims": [{**GOOD, "value": float("nan")}]}, "finite"),
        ({"claims": [{k: v for k, v in GOOD.items() if k != "source"}]}, "source"),
        ({"claims": [GOOD, GOOD]}, "occur twice in .*: a/b/c"),
        ({"verdicts": []}, "Extra inputs"),
        ([GOOD], "not a file of claims"),
        ("claims: [", "not a file of claims"),
    ],
)
def test_damaged_ledgers_are_refused(tmp_path: Path, content: Any, why: str) -> None:
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(ValueError, match=why):
        read_ledger(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no claims in .* no \.yaml files"):
        read_ledger(tmp_path)
