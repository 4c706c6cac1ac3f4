"""A row of table 3: missing files, plan, stand-in, and the whole of it on small files in the published formats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import skimage.data
from conftest import Run, error_of
from official_files import SMALL_VAE, declare_small_models, write_checkpoint, write_kl16, write_quick_inception
from published import publish

from tokenbridge.audit.paper import contradiction, doubts, known_hashes
from tokenbridge.evaluation import evaluate as evaluation
from tokenbridge.models import registry
from tokenbridge.models.tokenbridge.presets import PRESETS
from tokenbridge.reproduction import options as reproduction_options
from tokenbridge.reproduction import table3
from tokenbridge.reproduction.options import Options
from tokenbridge.reproduction.table3 import judge, published_row, reproduce_table3
from tokenbridge.results import score
from tokenbridge.results.compare import compare_published
from tokenbridge.results.ledger import published_metrics
from tokenbridge.results.schema import STAND_IN, Results, Row, read
from tokenbridge.tokenizers.kl16 import create_kl16
from tokenbridge.tokenizers.published import KL16
from tokenbridge.utils.files import sha256_of
from tokenbridge.weights import artifacts
from tokenbridge.weights.artifacts import ARTIFACTS, MissingArtifactsError

NUM_IMAGES = 6


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    write_quick_inception(file)
    return file


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in an empty folder, with empty caches and no network."""
    for name in ("cwd", "hub", "torch"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.delenv(artifacts.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> str:
    """Declare a published model so small that tests can run it, scored on few images."""
    name = declare_small_models(monkeypatch)
    publish(monkeypatch, f"table3/{name}", published_metrics("table3/tokenbridge-l"))
    monkeypatch.setitem(ARTIFACTS, name, replace(ARTIFACTS["tokenbridge-l"], key=name))
    small = replace(KL16, create=lambda: create_kl16(**SMALL_VAE))
    monkeypatch.setitem(registry.SYSTEMS, "tokenbridge", replace(registry.SYSTEMS["tokenbridge"], tokenizer=small))
    for module in (score, table3):
        monkeypatch.setattr(module, "NUM_IMAGES", NUM_IMAGES)
    monkeypatch.setattr(evaluation, "FEW", NUM_IMAGES)
    return name


@pytest.fixture
def folder(tmp_path: Path, preset: str, inception: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of small files under the published names; their hashes are declared for this test."""
    root = tmp_path / "artifacts"
    places = {key: root / ARTIFACTS[key].file for key in table3.needed_files(preset, Options())}
    for place in places.values():
        place.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(places[preset])
    write_kl16(places["kl16"])
    places["inception"].symlink_to(inception)
    random = np.random.RandomState(0)
    features = random.standard_normal((4096, 2048)).astype(np.float32)
    statistics = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    np.savez(places["adm-statistics"], **statistics)
    photograph = skimage.data.astronaut()
    images = np.stack([photograph[i : i + 8, i : i + 8] for i in range(0, 80, 10)])
    np.savez(places["adm-reference"], arr_0=images, **statistics)
    monkeypatch.setitem(ARTIFACTS, "inception", replace(ARTIFACTS["inception"], sha256=sha256_of(inception), size=None))
    monkeypatch.setitem(ARTIFACTS, "adm-statistics", replace(ARTIFACTS["adm-statistics"], git_sha1=None))
    return root


def options(**changes: Any) -> Options:
    return replace(Options(num_images=NUM_IMAGES, batch_size=4, num_bootstrap=2), **changes)


def test_every_missing_file_is_named_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table3, "_measure", lambda *_, **__: pytest.fail("this comes later"))
    with pytest.raises(MissingArtifactsError) as caught:
        reproduce_table3("tokenbridge-l", Options(), out="out")
    named = ["tokenbridge-l", "kl16", "inception", "adm-statistics", "adm-reference"]
    assert [missing.artifact.key for missing in caught.value.missing] == named
    assert not Path("out").exists()
    with pytest.raises(MissingArtifactsError) as caught:
        reproduce_table3("tokenbridge-h", Options(precision_recall=False), out="out")
    assert [missing.artifact.key for missing in caught.value.missing] == ["tokenbridge-h", *named[1:4]]


def test_a_plan_counts_and_lists_what_is_missing() -> None:
    planned = table3.plan("tokenbridge-l", Options(), out="out")
    assert (planned.num_images, planned.num_iterations, len(planned.missing)) == (50_000, 256, 5)
    assert 107 < sum(planned.flop_per_image.values()) / 1e12 < 112  # official code: 111.4, with a whole last block
    assert not Path("out").exists()


def test_the_whole_of_it_on_small_files(preset: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = reproduce_table3(preset, options(folder=folder), out="out", show_progress=False)
    assert done is not None
    results, judged = done
    (row,) = results.rows
    # What a genuine run writes contradicts nothing, and leaves nothing open but what this test declares anew.
    assert contradiction(results) is None
    known = known_hashes(results, folder)
    assert None not in known.values()
    left_open = doubts(results, row, "precision-50K", known)
    assert left_open in ([], ["the code that measured had uncommitted changes"])
    assert row.id == f"table3/{preset}"
    assert {"FID-50K", "IS-50K", "precision-50K", "recall-50K"} <= set(row.metrics)
    assert row.metrics["parameters"] == PRESETS[preset].num_parameters
    assert judged[row.id][0] == "not reproduced"  # random weights do not reach the paper's FID
    assert read("out/results.json") == results
    page = Path("out/tables.md").read_text()
    assert "not reproduced" in page
    assert "| FID-50K |" in page
    assert len(list(Path("out/samples/images").glob("*.png"))) == NUM_IMAGES
    assert Path("out/grid.png").is_file()
    p = results.provenance
    assert {"generator", "vae", "inception"} == set(p.weights_sha256)
    assert not any("precision" in reason for reason in p.settings["not run"])
    assert p.weights_sha256["vae"] == sha256_of(folder / "kl16.ckpt")
    assert p.settings["sampler"]["sampling"]["num_iterations"] == 4

    # What was measured, published: then it is reproduced. One number off: then not.
    measured = {f"{name}-50K": row.metrics[f"{name}-50K"] for name in table3.SCORES}
    publish(monkeypatch, row.id, measured)
    again = reproduce_table3(preset, options(folder=folder), out="out", show_progress=False)
    assert again is not None
    assert again[1][row.id][0] == "reproduced"
    assert again[0].provenance.settings["run"]["num_made"] == 0  # resumed: nothing was sampled twice
    publish(monkeypatch, row.id, {**measured, "FID-50K": measured["FID-50K"] * 1.05})
    assert judge(PRESETS[preset], again[0])[row.id][0] == "not reproduced"


def test_other_numbers_of_images_and_stand_ins_are_not_compared(
    preset: str, folder: Path, inception: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = options(num_images=4, precision_recall=False, num_bootstrap=0, folder=folder)
    (folder / ARTIFACTS["adm-reference"].file).unlink()
    done = reproduce_table3(preset, fewer, out="few", show_progress=False)
    assert done is not None
    results, judged = done
    assert list(judged.values()) == [("not compared", f"the paper's numbers are of {NUM_IMAGES:,} images")]
    assert "FID (4 images)" in results.rows[0].metrics
    assert any("precision" in reason for reason in results.provenance.settings["not run"])

    monkeypatch.setattr(table3, "write_random_inception", lambda path: path.symlink_to(inception))
    for module in (table3, reproduction_options):
        monkeypatch.setattr(module, "PHOTOGRAPHS", ("astronaut", "coffee"))
    monkeypatch.setitem(ARTIFACTS, "inception", replace(ARTIFACTS["inception"], sha256="0" * 64))
    Path("stand-in/stand-in").mkdir(parents=True)
    done = reproduce_table3(preset, options(stand_in=True, num_images=None), out="stand-in", show_progress=False)
    assert done is not None
    results, judged = done
    assert results.scale == STAND_IN
    assert next(iter(judged.values()))[0] == "not compared"
    assert "no result" in Path("stand-in/tables.md").read_text()
    assert not list(Path("stand-in/samples").glob("images/*"))


def test_a_column_that_was_not_measured_is_said_to_be(preset: str) -> None:
    published = published_metrics("table3/tokenbridge-l")
    metrics = {name: value for name, value in published.items() if name in ("FID-50K", "IS-50K")}
    verdict, why = compare_published(Row(id="table3/x", label="x", metrics=metrics), published_row(PRESETS[preset]))
    assert verdict == "not compared"  # half a row is not a row
    assert "not all were: precision-50K, recall-50K" in why
    off, _ = compare_published(
        Row(id="x", label="x", metrics={**metrics, "FID-50K": 9.0}), published_row(PRESETS[preset])
    )
    assert off == "not reproduced"
    assert published_row(PRESETS["tokenbridge-l"]).metrics["FID-50K"] == 1.76
    assert compare_published(Row(id="x", label="x", metrics=metrics), published_row(PRESETS["tokenbridge-b"])) == (
        "not compared",
        "nothing was published for tokenbridge-b",
    )


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenbridge-l", "--num-images", "1"], "at least 2"),
        (["tokenbridge-l", "--variant", "mine", "--plan"], "no sampling settings 'mine'"),
        (["tokenbridge-b"], "tokenbridge-b cannot be reproduced: no weights and no sampling settings were published"),
        (["tokenbridge-tiny"], "tokenbridge-tiny cannot be reproduced: it is this project's own"),
        (["mar", "--size", "xxl"], "mar of size 'xxl' cannot be reproduced: there is no such size"),
        (["mar-l", "--size", "l"], "--size goes with a system"),
    ],
)
def test_bad_input(run_command: Run, arguments: list[str], message: str) -> None:
    assert message in error_of(run_command("reproduce", *arguments))
    assert not Path("runs").exists()


def test_a_file_that_was_named_and_is_not_there(run_command: Run) -> None:
    code, out, err = run_command("reproduce", "tokenbridge-l", "--weights", "nowhere")
    assert (code, out) == (2, "")
    assert "Error: 5 files are missing." in err
    assert "--weights names nowhere, and the file is not there." in err
    assert err.count("name it with --reference-batch") == 1


def test_the_command(run_command: Run, preset: str, folder: Path) -> None:
    arguments = [preset, "--weights", folder, "--num-bootstrap", "0", "--num-images", str(NUM_IMAGES)]
    code, out, _ = run_command("reproduce", *arguments, "--json")
    assert code == 1  # not reproduced
    printed = json.loads(out)
    assert printed["verdicts"][0]["verdict"] == "not reproduced"
    printed.pop("verdicts")
    assert Results.model_validate(printed) == read(f"runs/{preset}/results.json")
    code, out, _ = run_command("reproduce", *arguments)
    assert code == 1
    assert out == Path(f"runs/{preset}/tables.md").read_text()


def test_several_run_what_has_its_files(
    run_command: Run, preset: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row is measured; table 1 lacks ImageNet, and nothing was published of the B size."""
    monkeypatch.setattr(table3, "NUM_BOOTSTRAP", 0)
    arguments = [preset, "table1", "tokenbridge-b", "--folder", folder, "--num-images", str(NUM_IMAGES)]
    code, out, err = run_command("reproduce", *arguments, "--no-precision-recall", "--json")
    found = {entry["id"]: entry for entry in json.loads(out)}
    assert list(found) == [f"table3/{preset}", "table1", "table3/tokenbridge-b"]
    assert found["table1"]["verdict"] == found["table3/tokenbridge-b"]["verdict"] == "not run"
    assert found["table1"]["why"].startswith("missing: imagenet; next: `hf download --repo-type dataset ")
    assert "no weights" in found["table3/tokenbridge-b"]["why"]
    assert found[f"table3/{preset}"]["verdict"] == "not reproduced"
    assert code == 1
    assert f"Running {preset}" in err
    assert read(f"runs/tables/{preset}/results.json").rows[0].metrics == found[f"table3/{preset}"]["metrics"]
    assert found[f"table3/{preset}"]["published"] == published_metrics(f"table3/{preset}")
