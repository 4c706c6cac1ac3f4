"""All tables of a scale, from its models to the verdicts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_scale import DATA, GENERATORS, MINI, NOT_TRAINED, TIMES, TRAINED, World
from PIL import Image

from tokenbridge.data.sources import load_images
from tokenbridge.reproduction.small_scale import reproduce_scale
from tokenbridge.results.compare import compare, verdicts
from tokenbridge.results.schema import Results, read
from tokenbridge.training.train import load
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import sha256_of
from tokenbridge.utils.provenance import hash_of_dataset
from tokenbridge.weights.diffusers import WEIGHTS_FILE


def test_results_are_a_valid_file(world: World) -> None:
    assert read(world.reference) == world.results
    provenance = world.results.provenance
    assert provenance.seed == 0
    files = [f"{name}/{file}" for name in TRAINED for file in ("config.json", WEIGHTS_FILE)]
    assert sorted(provenance.weights_sha256) == sorted(files)
    for name, found in provenance.weights_sha256.items():
        assert found == sha256_of(world.weights / name)
    assert provenance.settings["num_images"] == 20
    assert provenance.data_sha256 == {
        f"{DATA}/{split}": hash_of_dataset(load_images(str(world.root / DATA), split)) for split in ("train", "test")
    }


def test_tables_and_pictures_are_written(world: World) -> None:
    found = {path.name for path in (world.root / "first").iterdir()}
    assert found == {
        "results.json",
        "tables.md",
        "reconstruction.png",
        *(f"samples-{name}.png" for name in GENERATORS),
        "samples-tokenbridge-64-confidence.png",
        "tokens.json",
    }
    for name in found:
        if name.endswith(".png"):
            with Image.open(world.root / "first" / name) as picture:
                assert min(picture.size) > 100
    page = (world.root / "first" / "tables.md").read_text()
    for table in ("1a", "1b", "2a", "2b", "2c", "3", "5"):
        assert f"## Table {table}." in page


def test_rows_of_all_tables(world: World) -> None:
    by_table: dict[str, list[str]] = {}
    for row in world.results.rows:
        by_table.setdefault(row.table, []).append(row.id.split("/")[1])
    assert by_table == {
        "table1a": ["vae", "ptq-8", "ptq-16", "ptq-32", "ptq-64", "vq"],
        "table1b": ["vae", "range-2", "range-3", "range-4", "range-5"],
        "table2a": ["parallel", "autoregressive"],
        "table2b": ["natural", "frequency"],
        "table2c": ["16", "64"],
        "table3": [
            *("tokenbridge", "tokenbridge-16", "parallel", "llamagen", "givt", "mar"),
            *("tokenbridge-as-many", "real"),
        ],
        "table5": ["uncached", "cached", "diffusion", "mixture", "softmax"],
    }
    metrics = {row.id: row.metrics for row in world.results.rows}
    assert metrics["table1a/ptq-8"]["bits per image"] == 4 * 4 * 4 * 3  # 16 positions, 4 channels, 3 bits
    assert metrics["table1a/vq"]["bits per image"] == 4 * 4 * 4  # 16 positions, 16 codes
    for name in GENERATORS:
        model = load(MINI, name, world.weights)
        assert metrics[f"table3/{name.removesuffix('-64')}"]["parameters"] == sum(p.numel() for p in model.parameters())


def test_missing_generators_are_rows_not_run(world: World) -> None:
    not_run = {row.id: row.not_run for row in world.results.rows if row.not_run is not None}
    assert sorted(not_run) == [
        "table2a/parallel",
        "table2b/natural",
        "table2c/16",
        "table3/parallel",
        "table3/tokenbridge-16",
    ]
    for reason in not_run.values():
        assert reason is not None
        assert "tokenbridge train" in reason
        assert any(name in reason for name in NOT_TRAINED)
    assert {trend.id for trend in world.results.trends} == {
        "ptq-lossless",
        "ptq-beats-vq",
        "ar-against-real",
        "right-class",
        "fid-against-mar",
        "fid-against-givt",
        "fid-against-llamagen",
        "ar-against-diffusion",
    }  # but not the one that needs the parallel head
    page = (world.root / "first" / "tables.md").read_text()
    assert page.count("| not run |") == 5


def untimed(results: Results) -> dict[str, dict[str, float]]:
    return {row.id: {name: value for name, value in row.metrics.items() if name not in TIMES} for row in results.rows}


def test_reproducing_again_gives_the_same_numbers(world: World, tmp_path: Path) -> None:
    """On one machine with one thread all numbers but times come out the same to the last bit."""
    torch.manual_seed(4321)
    again, stored = reproduce_scale(MINI, weights=world.weights, out=tmp_path, reference=world.reference, num_images=20)
    assert stored == world.results
    assert untimed(again) == untimed(world.results)
    assert again.provenance.data_sha256 == world.results.provenance.data_sha256
    judged = verdicts(again, stored)
    for row in again.rows:
        if row.table != "table5":  # ratios of times of models this small: half of it is noise on a busy machine
            assert judged[row.id][0] == ("not run" if row.not_run else "reproduced"), judged[row.id]
    for name in ("reconstruction.png", "samples-tokenbridge-64.png"):
        with Image.open(tmp_path / name) as ours, Image.open(world.root / "first" / name) as theirs:
            assert ours.tobytes() == theirs.tobytes()


def test_other_seed_is_not_reproduced(world: World, tmp_path: Path) -> None:
    again, _ = reproduce_scale(MINI, weights=world.weights, out=tmp_path, reference=None, num_images=20, seed=1)
    ours, first = untimed(again), untimed(world.results)
    systems = {f"table3/{name.removesuffix('-64')}" for name in GENERATORS}
    samples = [id_ for id_ in ours if id_ in {"table2a/autoregressive", *systems}]
    assert {id_ for id_ in ours if ours[id_] != first[id_]} == {
        *samples,
        "table2b/frequency",
        "table2c/64",
        "table3/tokenbridge-as-many",
    }
    reference = {row.id: row for row in world.results.rows}
    [system] = [row for row in again.rows if row.id == "table3/tokenbridge"]
    assert compare(system, reference["table3/tokenbridge"])[0] == "not reproduced"


@pytest.mark.parametrize("missing", ["vae", "vq", "classifier"])
def test_missing_model_is_an_error_that_names_its_file(world: World, tmp_path: Path, missing: str) -> None:
    shutil.copytree(world.weights, tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights" / missing)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "weights" / missing / WEIGHTS_FILE))):
        reproduce_scale(MINI, weights=tmp_path / "weights", out=tmp_path / "out", reference=None, num_images=10)


def test_main_system_missing_is_not_run_like_the_others(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.weights, tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights" / "tokenbridge-64")
    found, _ = reproduce_scale(MINI, weights=tmp_path / "weights", out=tmp_path / "out", reference=None, num_images=10)
    assert {row.id for row in found.rows if row.not_run} >= {"table3/tokenbridge", "table5/cached"}


def test_a_folder_is_of_one_run(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed between its pictures and its results leaves those of the older run, all of them."""

    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    shutil.copytree(world.root / "first", tmp_path / "out")
    before = contents()
    for step in ("golden_tokens", "trends", "markdown.to_markdown"):
        with monkeypatch.context() as patch:
            patch.setattr(f"tokenbridge.reproduction.small_scale.{step}", killed)
            with pytest.raises(KeyboardInterrupt):
                reproduce_scale(
                    MINI, weights=world.weights, out=tmp_path / "out", reference=None, num_images=10, seed=1
                )
        assert contents() == before
    (tmp_path / "out" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out is not replaced, because it holds diary\.txt, which is not one of ours"):
        reproduce_scale(MINI, weights=world.weights, out=tmp_path / "out", reference=None, num_images=10)
