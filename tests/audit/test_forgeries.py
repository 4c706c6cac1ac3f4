"""Forged result files: what each of them may say about a claim, which is never that the claim is reproduced.

The honest file, of which every forgery is a change, is `builders.paper_run`. Its published files were "recorded here"
(`builders.record_published`), so that what each forgery changes is the only thing wrong with it.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from builders import RECORDED, make_results, paper_run, paper_settings, record_published
from hypothesis import given
from hypothesis import strategies as st

from tokenbridge.audit.audit import audit_claims
from tokenbridge.audit.findings import Audit, Finding
from tokenbridge.audit.paper import contradiction, doubts
from tokenbridge.models.registry import find_preset
from tokenbridge.results.ledger import shipped_ledger
from tokenbridge.results.schema import Row, digest_of, read, write
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import reference_folder
from tokenbridge.weights import artifacts

ROW = "table3/tokenbridge-l"
SCORES = {
    "FID_50K": 1.76,
    "FID_low": 1.74,
    "FID_high": 1.78,
    "IS_50K": 294.8,
    "precision_50K": 0.80,
    "recall_50K": 0.63,
}
SHIPPED = reference_folder()


def claim(row: str, metric: str, value: float, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"{row}/{metric}",
        "text": f"{row}, {metric}",
        "source": "a table",
        "scale": "paper",
        "recipe": "a command",
        "value": value,
        "row": row,
        "metric": f"{metric}-50K",
        "tolerance": {"relative": 0.03, "absolute": 0.005, "reason": "spread over seeds"},
        **changes,
    }


CLAIMS = [
    *(
        claim(ROW, metric, value)
        for metric, value in (("FID", 1.76), ("IS", 294.8), ("precision", 0.8), ("recall", 0.63))
    ),
    claim("table3/llamagen-l-256", "FID", 3.8),  # no sampling settings were published
    claim("table3/maskgit", "FID", 6.18, not_applicable="another system"),
    claim("table2a/parallel", "FID", 15.7),  # no weights were published
    claim("table1a/vae", "rFID", 1.11),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a folder that has the record of the published files, with few claims and no shipped results."""
    for name in ("cwd", "hub", "torch", "shipped/paper"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv(artifacts.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    record_published(tmp_path / "cwd", "tokenbridge-l")
    (tmp_path / "shipped" / "paper" / "claims.yaml").write_text(yaml.safe_dump({"claims": CLAIMS}))
    monkeypatch.setattr("tokenbridge.utils.files.reference_folder", lambda: tmp_path / "shipped")


def honest() -> dict[str, Any]:
    return dict(paper_run("tokenbridge-l", **SCORES).model_dump(mode="json"))


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the honest file, and compute its digest anew, as a forger does."""
    value = honest()
    change(value)
    path.write_text(json.dumps({**value, "sha256": digest_of(value)}))
    return path


def judged(path: Path) -> dict[str, Finding]:
    done = audit_claims([path], checks={}, fail_on=())
    return {finding.claim.id.removeprefix(f"{ROW}/"): finding for finding in done.findings}


def changed(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    """Set the field at `path`; a field that is set to `...` is deleted."""

    def change(value: dict[str, Any]) -> None:
        inner: Any = value
        for key in path[:-1]:
            inner = inner[key]
        if to is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = to

    return change


def setting(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    return changed("provenance", "settings", *path, to=to)


def score(name: str, to: Any) -> Callable[[dict[str, Any]], None]:
    return changed("rows", 0, "metrics", name, to=to)


def both(*changes: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        for one in changes:
            one(value)

    return change


def weights(part: str, to: Any) -> Callable[[dict[str, Any]], None]:
    """Change a hash of weights wherever the file has it."""
    return both(
        changed("provenance", "weights_sha256", part, to=to),
        *([setting("sampler", "weights", part, to=to)] if part != "inception" else []),
    )


def data(name: str, to: Any) -> Callable[[dict[str, Any]], None]:
    return changed("provenance", "data_sha256", name, to=to)


def second_row(name: str) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        metrics = {**value["rows"][0]["metrics"], "parameters": find_preset(name)[1].num_parameters}
        value["rows"].append({"id": f"table3/{name}", "label": name, "metrics": metrics, "not_run": None})

    return change


def unknown_hashes(value: dict[str, Any]) -> None:
    Path(artifacts.LOCK_FILE).unlink()


STATISTICS, BATCH = "fid_stats/adm_in256_stats.npz", "VIRTUAL_imagenet256_labeled.npz"
NOW = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
TOMORROW = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)).isoformat(timespec="seconds")
SAMPLING = asdict(find_preset("tokenbridge-l")[1].sampling_config())
SIZES = dict(find_preset("tokenbridge-l")[1].model)

# Of a forgery: the change, and why the file is refused.
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "3 images in the row": (score("images", 3.0), "it has 3 images, and the setting num_images is 50000"),
    "2 images in the run": (setting("run", "num_images", to=2), "its run has 2 images"),
    "more made than there are": (setting("run", "num_made", to=60_000), "its run made 60,000 of 50,000 images"),
    "images as a fraction": (setting("num_images", to=50_000.0), "'num_images' is 50000.0, not a whole number"),
    "images as text": (setting("num_images", to="50000"), "'num_images' is '50000', not a whole number"),
    "images as truth": (setting("num_images", to=True), "'num_images' is True, not a whole number"),
    "images as a list": (setting("num_images", to=[50_000]), "not a whole number"),
    "Inception as text": (setting("published Inception weights", to="yes"), "is 'yes', not true or false"),
    "Inception as a number": (setting("published Inception weights", to=1), "is 1, not true or false"),
    "images of the run as text": (setting("run", "num_images", to="50000"), "num_images of its run is '50000'"),
    "run as a list": (setting("run", to=[]), "'run' is [], not an object"),
    "sampler as text": (setting("sampler", to="the published one"), "not an object"),
    "7 parameters": (score("parameters", 7.0), "7 parameters, and tokenbridge-l has 486,889,472"),
    "7 parameters of the sampler": (setting("sampler", "num_parameters", to=7), "its sampler has 7 parameters"),
    "sampler of another system": (setting("sampler", "system", to="mar"), "is of tokenbridge"),
    "stand-in weights, by rule": (
        setting("sampler", "weights", to={"rule": "a rule", "salt": "stand-in"}),
        "which were drawn by a rule",
    ),
    "stand-in weights, by label": (
        changed("rows", 0, "label", to="x, Stand-In weights, no result"),
        "of stand-in weights",
    ),
    "weights of the sampler differ": (setting("sampler", "weights", "generator", to="9" * 64), "another generator"),
    "10^9 seconds an image": (score("seconds per image", 1e9), "an image took 1e+09 seconds"),
    "no seconds an image": (score("seconds per image", 0.0), "an image took 0 seconds"),
    "a run longer than everything": (changed("provenance", "wall_seconds", to=60.0), "and all of it 60"),
    "took until tomorrow": (
        both(changed("provenance", "started", to=NOW), changed("provenance", "wall_seconds", to=90_000.0)),
        "which have not passed",
    ),
    "took longer than the world": (changed("provenance", "wall_seconds", to=1e308), "which have not passed"),
    "precision of a joke": (setting("sampler", "dtype", to="fp4"), "its dtype is 'fp4', and there are fp32, bf16"),
    "compiled by a number": (setting("sampler", "compiled", to=1), "its compiled is 1, and there are True, False"),
    "chosen images": (setting("randomness", to="the best of ten"), "its randomness is 'the best of ten'"),
    "changes as a number": (setting("run", "changes", to=3), "the changes of its run are 3, not a list"),
    "changes as numbers": (setting("run", "changes", to=[3]), "the changes of its run are [3], not a list"),
    "a run of no time": (
        both(setting("run", "seconds", to=0.0), score("seconds per image", ...)),
        "made 50,000 images in 0 seconds",
    ),
    "seconds of the run as text": (setting("run", "seconds", to="long"), "the seconds of its run are 'long'"),
    "negative time": (changed("provenance", "wall_seconds", to=-5.0), "it took -5 seconds"),
    "no time": (changed("provenance", "wall_seconds", to=0.0), "it took 0 seconds"),
    "started tomorrow, in words": (changed("provenance", "started", to="tomorrow"), "no time with a time zone"),
    "started tomorrow": (changed("provenance", "started", to=TOMORROW), "it started in the future"),
    "seed -1": (changed("provenance", "seed", to=-1), "its seed is -1"),
    "seed as truth": (changed("provenance", "seed", to=True), "provenance.seed"),
    "score as text": (score("FID-50K", "1.76"), "rows.0.metrics.FID-50K"),
    "interval beside the value": (both(score("FID-50K", 9.0), score("FID-low", 1.76)), "does not hold its value 9"),
    "interval upside down": (both(score("FID-low", 5.0), score("FID-high", 1.0)), "does not hold its value"),
    "interval below the value": (both(score("FID-low", 1.0), score("FID-high", 1.2)), "1 to 1.2, does not hold"),
    "half an interval": (score("FID-high", ...), "has one end"),
    "another FID beside it": (
        both(score("FID", 99.0), score("FID-low", ...), score("FID-high", ...)),
        "FID is 99, and both are of the same images",
    ),
    "clean-fid's formula differs": (score("FID-cleanfid", 3.0), "FID-cleanfid is 3"),
    "another IS beside it": (score("IS", 20.0), "both are of the same images"),
    "another precision beside it": (score("precision", 0.1), "both are of the same images"),
    "scores of another Inception": (score("FID-other-inception", 1.76), "not by the published Inception"),
    "IS of more classes than there are": (score("IS-50K", 2000.0), "IS-50K 2000, which no measurement"),
    "precision of 2": (score("precision-50K", 2.0), "which no measurement"),
    "recall below 0": (score("recall-50K", -0.5), "which no measurement"),
    "negative FID": (score("FID-50K", -1.0), "which no measurement"),
    "hash that is none": (weights("generator", "fff"), "SHA-256 of generator is none: 'fff'"),
    "hash in capitals": (
        weights("inception", str(artifacts.ARTIFACTS["inception"].sha256).upper()),
        "inception is none",
    ),
    "hash of the samples that is none": (data("runs/samples", ""), "runs/samples is none"),
    "another generator": (weights("generator", "9" * 64), "generator of SHA-256 9999"),
    "another tokenizer": (weights("vae", "9" * 64), "vae of SHA-256 9999"),
    "another Inception": (weights("inception", "9" * 64), "inception of SHA-256 9999"),
    "no Inception": (weights("inception", ...), "does not say what Inception weights"),
    "other statistics": (data(STATISTICS, "9" * 64), "adm_in256_stats.npz of SHA-256 9999"),
    "other reference images": (data(BATCH, "9" * 64), "labeled.npz of SHA-256 9999"),
    "two systems in one file": (
        second_row("mar-l"),
        "names one generator for 2 rows: table3/tokenbridge-l, table3/mar-l",
    ),
    "two sizes in one file": (second_row("tokenbridge-h"), "names one generator for 2 rows"),
    "a row twice": (second_row("tokenbridge-l"), "rows twice"),
}

# Of a forgery: the change, the claims that it leaves in doubt, and why.
ALL = ("FID", "IS", "precision", "recall")
IN_DOUBT: dict[str, tuple[Callable[[dict[str, Any]], object], tuple[str, ...], str]] = {
    "no generator": (weights("generator", ...), ALL, "names no generator"),
    "no tokenizer": (weights("vae", ...), ALL, "names no tokenizer"),
    "tokenizer of another kind": (both(weights("vae", ...), weights("vq", "2" * 64)), ALL, "names no tokenizer"),
    "no statistics": (data(STATISTICS, ...), ALL, "names no reference statistics"),
    "statistics of another name": (
        both(data(STATISTICS, ...), data("own_samples_as_reference.npz", "7" * 64)),
        ALL,
        "names no reference statistics",
    ),
    "statistics beside the right ones": (
        data("own_samples_as_reference.npz", "7" * 64),
        ALL,
        "other images or references",
    ),
    "no reference images": (data(BATCH, ...), ("precision", "recall"), "names no reference batch"),
    "no samples": (data("runs/samples", ...), ALL, "no hash of the images that were scored"),
    "nothing recorded here": (unknown_hashes, ALL, "SHA-256 of its generator is neither published nor recorded here"),
    "no sampler": (setting("sampler", to=...), ALL, "with what weights and settings"),
    "sampler without weights": (setting("sampler", "weights", to=...), ALL, "with what weights and settings"),
    "sampler without settings": (setting("sampler", "sampling", to=...), ALL, "with what weights and settings"),
    "2 iterations": (setting("sampler", "sampling", "num_iterations", to=2), ALL, "num_iterations 2 against 256"),
    "iterations as a fraction": (setting("sampler", "sampling", "num_iterations", to=256.0), ALL, "256.0 against 256"),
    "other guidance": (setting("sampler", "sampling", "guidance_scale", to=4.0), ALL, "guidance_scale 4.0 against 3.1"),
    "other temperature": (setting("sampler", "sampling", "temperature", to=0.5), ALL, "temperature 0.5 against 0.96"),
    "other schedule": (setting("sampler", "sampling", "guidance_schedule", to="constant"), ALL, "guidance_schedule"),
    "a setting more": (setting("sampler", "sampling", "best_of", to=10), ALL, "best_of 10 against None"),
    "a setting less": (setting("sampler", "sampling", "temperature", to=...), ALL, "temperature None against 0.96"),
    "settings as a list": (setting("sampler", "sampling", to=[]), ALL, "not sampled with the published settings"),
    "other labels": (setting("labels", to="only the easy classes"), ALL, "the labels were not balanced"),
    "no labels": (setting("labels", to=...), ALL, "the labels were not balanced"),
    "no record of the run": (setting("run", to=...), ALL, "no record of the sampling run"),
    "images of other code": (
        setting(
            "run", "changes", to=["num_images was 10 and is now 50000", 'made_with.torch was "2.0" and is now "2.9"']
        ),
        ALL,
        'made by other code or libraries (made_with.torch was "2.0"',
    ),
    "model of another width": (
        setting("sampler", "config", to={"generator": {**SIZES, "width": 512}, "vae": {}}),
        ALL,
        "the width of its generator is not that of tokenbridge-l",
    ),
    "model of no sizes": (setting("sampler", "config", to={}), ALL, "of its generator is not that of tokenbridge-l"),
    "sizes as text": (setting("sampler", "config", to="L"), ALL, "of its generator is not that of tokenbridge-l"),
    "images not counted": (score("images", ...), ALL, "does not count its images"),
    "uncommitted changes": (changed("provenance", "dirty", to=True), ALL, "uncommitted changes"),
    "IS 1 beside FID 1.76": (score("IS-50K", 1.0), ALL, "IS 1 does not go with FID 1.76"),
    "precision 0 beside FID 1.76": (score("precision-50K", 0.0), ALL, "precision 0 does not go with FID 1.76"),
    "recall 0 beside FID 1.76": (score("recall-50K", 0.0), ALL, "recall 0 does not go with FID 1.76"),
    "wide interval": (both(score("FID-low", 0.5), score("FID-high", 3.0)), ("FID",), "95 % interval 0.5 to 3"),
}


def test_the_honest_file_decides(tmp_path: Path) -> None:
    """The control: without a change, all four numbers are reproduced."""
    found = judged(forge(tmp_path / "results.json", lambda value: None))
    assert {name: found[name].verdict for name in ALL} == dict.fromkeys(ALL, "reproduced")
    wrong = judged(forge(tmp_path / "results.json", both(score("IS-50K", 200.0), score("recall-50K", 0.5))))
    assert [wrong[name].verdict for name in ALL] == ["reproduced", "not reproduced", "reproduced", "not reproduced"]
    papers = judged(forge(tmp_path / "results.json", setting("sampler", "sampling", "temperature", to=0.97)))
    assert papers["FID"].verdict == "reproduced"  # the paper's table 4 has another temperature than the README


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused(tmp_path: Path, case: str) -> None:
    change, why = REFUSED[case]
    path = forge(tmp_path / "results.json", change)
    with pytest.raises(UserError) as caught:
        judged(path)
    assert why in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("case", IN_DOUBT)
def test_what_is_left_open_is_in_doubt(tmp_path: Path, case: str) -> None:
    change, claims, why = IN_DOUBT[case]
    found = judged(forge(tmp_path / "results.json", change))
    for name in ALL:
        if name in claims:
            assert found[name].verdict == "within doubt"
            assert why in found[name].why
            assert "asked within" in found[name].why  # the number is shown all the same
        else:
            assert found[name].verdict == "reproduced"


@pytest.mark.parametrize("case", IN_DOUBT)
def test_nor_does_it_contradict_anything(tmp_path: Path, case: str) -> None:
    """A file that proves nothing must not turn a claim into "not reproduced" either."""
    change, _, _ = IN_DOUBT[case]
    if case == "wide interval":
        return
    bad = both(change, score("FID-50K", 5.0), score("FID-low", 4.9), score("FID-high", 5.1))
    found = judged(forge(tmp_path / "results.json", bad))
    if case != "no reference images":
        assert found["FID"].verdict == "within doubt"


def test_all_claims_of_the_paper_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every row of the ledger and its published value, signed, and with hashes of nobody."""
    monkeypatch.setattr("tokenbridge.utils.files.reference_folder", lambda: SHIPPED)
    ledger = shipped_ledger()
    rows: dict[str, dict[str, float]] = {}
    for each in ledger.claims:
        if each.scale == "paper" and each.row and each.metric and each.value is not None:
            rows.setdefault(each.row, {"images": 50_000.0}).setdefault(each.metric, each.value)
    assert len(rows) > 50
    run = paper_run("tokenbridge-l")

    names = {each.check for each in ledger.claims} | {name for each in ledger.discrepancies for name in each.checks}
    checks = {str(name): lambda: 1.0 for name in names}  # what they count is not the subject, and takes seconds

    def audit_of(rows: list[Row], **changes: Any) -> Audit:
        provenance = run.provenance.model_copy(update=changes)
        write(tmp_path / "results.json", run.model_copy(update={"rows": rows, "provenance": provenance}))
        return audit_claims([tmp_path / "results.json"], runs=tmp_path, folder=tmp_path, fail_on=(), checks=checks)

    every = [Row(id=id_, label=id_, metrics=metrics) for id_, metrics in rows.items()]
    with pytest.raises(UserError, match="one generator for"):
        audit_of(every)
    nobody = {"data_sha256": {}, "weights_sha256": {"inception": run.provenance.weights_sha256["inception"]}}
    before = audit_claims(runs=tmp_path, folder=tmp_path, fail_on=(), checks=checks)
    today = {finding.claim.id: finding.verdict for finding in before.findings}
    bare = {**nobody, "settings": paper_settings()}
    done = audit_of(every, **bare)
    assert not [f.claim.id for f in done.findings if f.claim.scale == "paper" and f.verdict == "reproduced"]
    for found in done.findings:
        if found.claim.scale == "paper" and found.verdict != today[found.claim.id]:
            assert (today[found.claim.id], found.verdict) == ("not run", "within doubt")
        if found.claim.not_applicable is not None:
            assert found.verdict == "not applicable at this scale"


@pytest.mark.parametrize(
    ("row", "metric", "value", "verdict", "why"),
    [
        ("table3/maskgit", "FID", 6.18, "not applicable at this scale", "another system"),
        ("table3/llamagen-l-256", "FID", 3.8, "not run", "no sampling settings were published"),
        ("table2a/parallel", "FID", 15.7, "not run", "no recipe of this project measures"),
    ],
)
def test_what_cannot_be_measured_here_is_decided_by_no_file(
    tmp_path: Path, row: str, metric: str, value: float, verdict: str, why: str
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["rows"] = [{"id": row, "label": row, "metrics": {"images": 50_000.0, f"{metric}-50K": value}}]

    found = judged(forge(tmp_path / "results.json", change))[f"{row}/{metric}"]
    assert (found.verdict, found.measured) == (verdict, None)
    assert why in found.why


def table1(**changes: Any) -> dict[str, Any]:
    """Return what table 1 at the paper's scale writes, of one row."""
    fields: dict[str, Any] = {
        "started": "2025-01-01T00:00:00+00:00",
        "data_sha256": {"imagenet/train, as measured": "3" * 64},
        "weights_sha256": {
            "kl16": RECORDED["tokenizer"],
            "adm-statistics": RECORDED["adm-statistics"],
            "inception": str(artifacts.ARTIFACTS["inception"].sha256),
        },
        "settings": paper_settings(posterior="sampled once per image", precision="float32"),
        **changes,
    }
    row = Row(id="table1a/vae", label="VAE", metrics={"images": 50_000.0, "rFID-50K": 1.11})
    return dict(make_results([row], **fields).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("change", "verdict", "why"),
    [
        (lambda value: None, "reproduced", "asked within"),
        (changed("provenance", "weights_sha256", "kl16", to=...), "within doubt", "names no tokenizer"),
        (changed("provenance", "weights_sha256", "adm-statistics", to=...), "within doubt", "no reference statistics"),
        (changed("provenance", "data_sha256", to={}), "within doubt", "images that were reconstructed"),
        (setting("posterior", to="the mean"), "within doubt", "the posterior was not sampled once per image"),
        (setting("precision", to="bfloat16"), "within doubt", "the precision was not float32"),
    ],
)
def test_table_1(tmp_path: Path, change: Callable[[dict[str, Any]], object], verdict: str, why: str) -> None:
    value = table1()
    change(value)
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**value, "sha256": digest_of(value)}))
    found = judged(path)["table1a/vae/rFID"]
    assert found.verdict == verdict
    assert why in found.why


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
places = st.sampled_from(
    [
        ("num_images",),
        ("published Inception weights",),
        ("run",),
        ("sampler",),
        ("labels",),
        *(("run", key) for key in ("num_images", "num_made", "seconds")),
        *(("sampler", key) for key in ("system", "num_parameters", "sampling", "weights")),
        *(("sampler", "sampling", key) for key in SAMPLING),
    ]
)


@given(places, json_values)
def test_any_value_at_any_place_is_judged_and_never_passes(place: tuple[str, ...], value: Any) -> None:
    """Whatever stands in a setting: a sentence, and nothing but the honest value is without doubt."""
    content = honest()
    inner = content["provenance"]["settings"]
    for key in place[:-1]:
        inner = inner[key]
    before = inner[place[-1]]
    inner[place[-1]] = value
    results = type(paper_run()).model_validate(content)
    known = {
        "tokenbridge-l": RECORDED["generator"],
        "kl16": RECORDED["tokenizer"],
        "inception": str(artifacts.ARTIFACTS["inception"].sha256),
        "adm-statistics": RECORDED["adm-statistics"],
        "adm-reference": RECORDED["adm-reference"],
    }
    wrong = contradiction(results)
    if wrong is None:
        open_questions = doubts(results, results.rows[0], "FID-50K", known)
        papers = place == ("sampler", "sampling", "temperature") and value == 0.97
        same = json.dumps(before, sort_keys=True) == json.dumps(value, sort_keys=True)
        harmless = place == ("run", "seconds") and abs(value - before) <= 0.01 * before + 0.01
        not_published = place == ("published Inception weights",) and value is False  # which decides nothing either
        assert open_questions or same or papers or harmless or not_published


# ------------------------------------------------------------------------------------------------------ small scale


def tiny(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    value = json.loads((SHIPPED / "tiny" / "results.json").read_text())
    change(value)
    value["trends"] = []
    path.write_text(json.dumps({**value, "sha256": digest_of(value)}))
    return path


def tiny_score(row: str, name: str, to: float) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        next(each for each in value["rows"] if each["id"] == row)["metrics"][name] = to

    return change


@pytest.fixture
def trends(tmp_path: Path) -> Path:
    """The shipped tiny results and the claims that they decide."""
    folder = tmp_path / "shipped"
    shutil.copy(SHIPPED / "paper" / "trends.yaml", folder / "paper" / "claims.yaml")
    (folder / "tiny").mkdir()
    shutil.copy(SHIPPED / "tiny" / "results.json", folder / "tiny")
    (folder / "tiny" / "weights").symlink_to(SHIPPED / "tiny" / "weights")
    return folder


def test_a_forged_row_of_tiny_results_decides_no_trend(trends: Path, tmp_path: Path) -> None:
    def verdict(path: Path, id_: str) -> tuple[str, str]:
        done = audit_claims([path], runs=tmp_path, checks={}, fail_on=())
        found = next(f for f in done.findings if f.claim.trend == id_)
        return found.verdict, found.why

    # The copy of the shipped results, dated anew, decides as they do.
    same = tiny(tmp_path / "same.json", changed("provenance", "wall_seconds", to=100.0))
    assert verdict(same, "fid-against-llamagen")[0] == "not reproduced"
    assert verdict(same, "ar-against-parallel")[0] == "reproduced"
    # A worse LlamaGen makes TokenBridge better.
    forged = tiny(tmp_path / "forged.json", tiny_score("table3/llamagen", "FID-digits", 9.0))
    found, why = verdict(forged, "fid-against-llamagen")
    assert found == "within doubt"
    assert why.startswith("not as in the shipped results: table3/llamagen (FID-digits 9 against 0.0")
    assert verdict(forged, "ar-against-parallel")[0] == "reproduced"  # which rests on other rows
    # And a worse head must not make the claim fall.
    smeared = tiny(tmp_path / "smeared.json", tiny_score("table2a/parallel", "FID-digits", 0.05))
    assert verdict(smeared, "ar-against-parallel")[0] == "within doubt"


def test_rows_within_their_tolerances_do_not_turn_a_trend(trends: Path, tmp_path: Path) -> None:
    """A trend that lies near its bound: each row within its tolerance, and together they say the contrary."""
    shipped = read(trends / "tiny" / "results.json")
    ratio = next(t.measured for t in shipped.trends if t.id == "fid-against-mar")

    def near(value: dict[str, Any]) -> None:
        rows = {row["id"]: row["metrics"] for row in value["rows"]}
        # Make the shipped rows lie just within the bound of 1.2, then forge them within 5 % + 0.002.
        rows["table3/mar"]["FID-digits"] = rows["table3/tokenbridge"]["FID-digits"] / 1.19

    path = tiny(trends / "tiny" / "results.json", near)
    value = json.loads(path.read_text())
    mar = next(row for row in value["rows"] if row["id"] == "table3/mar")
    mar["metrics"]["FID-digits"] *= 0.97
    value["provenance"]["wall_seconds"] = 99.0
    forged = tmp_path / "forged.json"
    forged.write_text(json.dumps({**value, "sha256": digest_of(value)}))
    done = audit_claims([forged], runs=tmp_path, checks={}, fail_on=())
    found = next(f for f in done.findings if f.claim.trend == "fid-against-mar")
    assert ratio < 1.2
    assert found.verdict == "within doubt"
    assert "fid-against-mar (the shipped rows do not say so)" in found.why


def test_weights_are_looked_for_in_their_folder_alone(trends: Path, tmp_path: Path) -> None:
    for name in ("../../secret", str(tmp_path / "secret")):
        path = tiny(tmp_path / "results.json", changed("provenance", "weights_sha256", name, to="0" * 64))
        with pytest.raises(UserError, match="outside of the folder of its models"):
            audit_claims([path], runs=tmp_path, checks={}, fail_on=())
