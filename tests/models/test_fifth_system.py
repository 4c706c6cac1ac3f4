"""A fifth system, from a folder outside the package: what tokenbridge/models/README.md promises."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Run, error_of
from gaussians.model import Gaussians
from gaussians.sampling import GaussiansSampling
from gaussians.system import SYSTEM
from PIL import Image

from tokenbridge.configs.scales import SCALES
from tokenbridge.configs.schema import Recipe, TrainingConfig
from tokenbridge.configs.tiny import TINY
from tokenbridge.data.sources import load_images
from tokenbridge.models.registry import SYSTEMS
from tokenbridge.results.schema import read
from tokenbridge.utils.files import reference_folder

MODEL = {"latent_size": 4, "num_channels": 16, "num_classes": 10}
RECIPE = Recipe(
    name="gaussians",
    kind="gaussians",
    model=MODEL,
    training=TrainingConfig(num_steps=20, batch_size=32, warmup_steps=2, learning_rate=0.05),
    sampling=GaussiansSampling(),
)
SHIPPED = ("vae", "vq", "classifier")  # what the tables need beside the generators


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder with few digits and the shipped tokenizers; register the system and its scale."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for split, step in (("train", 40), ("test", 50)):
        digits = load_images("digits", split)
        digits.select(range(0, len(digits), step)).to_parquet(tmp_path / "digits" / f"{split}.parquet")
    (tmp_path / "weights").mkdir()
    for name in SHIPPED:
        (tmp_path / "weights" / name).symlink_to(reference_folder() / "tiny" / "weights" / name)
    monkeypatch.setitem(SYSTEMS, SYSTEM.name, SYSTEM)  # the one line
    recipes = (*(TINY.recipe(name) for name in SHIPPED), RECIPE)
    monkeypatch.setitem(SCALES, "fifth", replace(TINY, name="fifth", data=str(tmp_path / "digits"), recipes=recipes))
    return tmp_path


def test_it_goes_through_the_ordinary_commands(folder: Path, run_command: Run) -> None:
    (folder / "runs").mkdir()
    (folder / "runs" / "weights").symlink_to(folder / "weights")
    code, out, _ = run_command("train", "fifth", "gaussians", "--out", "runs", "--json")
    assert code == 0
    curve = json.loads(out)["loss"]
    assert curve[-1][1] < 2.0  # of unit normal latents: 1.42 nats

    options = ("--weights", "weights", "--label", "3", "--num-images", "2")
    code, out, _ = run_command("sample", "fifth/gaussians", *options, "--temperature", "0.5", "--out", "images")
    assert code == 0
    assert "2 images (fifth/gaussians)" in out
    assert Image.open("images/images/000001.png").size == (32, 32)
    recipe = json.loads(Path("images/run.json").read_text())["recipe"]
    assert recipe["sampler"]["system"] == "gaussians"
    assert recipe["sampler"]["sampling"] == {"temperature": 0.5}

    code, out, _ = run_command("sample", "fifth/gaussians", *options, "--plan", "--json")
    assert code == 0
    assert json.loads(out)["tflop_per_image"]["linear layer"] == round(2 * 10 * 2 * 16 * 16 / 1e12, 4)

    code, _, err = run_command("reproduce", "fifth", "--weights", "weights", "--num-images", "20", "--out", "tables")
    assert code == 0, err
    (row,) = (row for row in read("tables/results.json").rows if row.id == "table3/gaussians")
    assert row.not_run is None
    assert row.metrics["parameters"] == sum(p.numel() for p in Gaussians(**MODEL).parameters())
    assert row.metrics["FID-digits"] > 0

    code, out, _ = run_command("models")
    assert code == 0
    assert "gaussians-s" in out


def test_its_errors_are_the_ordinary_ones(folder: Path, run_command: Run) -> None:
    sample = ("sample", "fifth/gaussians", "--weights", "weights", "--num-images", "2")
    assert "no setting guidance_scale; it has temperature" in error_of(run_command(*sample, "--guidance-scale", "3"))
    assert "The temperature must be at least 0" in error_of(run_command(*sample, "--temperature", "-1"))
    assert "cannot be 'warm'" in error_of(run_command(*sample, "--temperature", "warm"))
    assert "no official randomness" in error_of(run_command(*sample, "--randomness", "official"))
    assert "generator of fifth/gaussians: there is no weights/gaussians" in error_of(run_command(*sample))


def test_without_its_line_it_is_unknown(folder: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: nothing but the registry makes the system known."""
    monkeypatch.delitem(SYSTEMS, "gaussians")
    assert "Unknown model 'gaussians-s'" in error_of(run_command("sample", "gaussians-s", "--plan"))
    code, _, _ = run_command("train", "fifth", "gaussians", "--out", "runs")
    assert code != 0
