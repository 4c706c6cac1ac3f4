"""A miniature scale from training to verdicts, and the command line on it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import Run, error_of
from datasets import Dataset
from PIL import Image

from tokenbridge.cli import options
from tokenbridge.configs import scales as recipes
from tokenbridge.configs.schema import Scale, TrainingConfig
from tokenbridge.configs.tiny import TINY
from tokenbridge.data.images import load_images
from tokenbridge.models.masked_sampling import MaskedSampling
from tokenbridge.reproduction.small_scale import reproduce_scale
from tokenbridge.results.compare import compare, verdicts
from tokenbridge.results.schema import Results, digest_of, read
from tokenbridge.training import train as experiment
from tokenbridge.training.scale import run_command as run_command_itself
from tokenbridge.training.train import build, load, train_recipe
from tokenbridge.utils.files import sha256_of
from tokenbridge.utils.provenance import hash_of_dataset
from tokenbridge.weights.diffusers import WEIGHTS_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DATA = "mini-digits"  # a folder in the working directory of these tests
GENERATORS = ("tokenbridge-64", "mar", "givt", "llamagen")
TRAINED = ("vae", "vq", "classifier", *GENERATORS)
NOT_TRAINED = ("parallel-64", "tokenbridge-16", "tokenbridge-64-natural")
TIMES = {"seconds per image", "ms per position", "± ms", "speed-up", "against diffusion"}

STEPS = TrainingConfig(num_steps=5, batch_size=8, warmup_steps=2, learning_rate=1e-3)
SMALLER: dict[str, dict[str, Any]] = {
    "autoencoder": {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4},
    "vq": {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "num_vq_embeddings": 16, "vq_embed_dim": 4},
    "classifier": {"widths": (8, 8, 8, 8)},
    "tokenbridge": {
        **{"num_channels": 4, "width": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "num_buffer": 2},
        **{"head_width": 16, "head_depth": 1, "head_num_heads": 2},
    },
    "mar": {
        **{"num_channels": 4, "width": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "num_buffer": 2},
        **{"head_width": 16, "head_depth": 1},
    },
    "givt": {"num_channels": 4, "num_components": 2, "width": 16, "depth": 1, "num_heads": 2, "mlp_width": 16},
    "llamagen": {"num_codes": 16, "width": 16, "depth": 1, "num_heads": 2, "hidden_multiple": 16},
}


def miniature(scale: Scale = TINY) -> Scale:
    """Return `scale` with the same recipes, of models and trainings that take no time."""
    small = []
    for recipe in scale.recipes:
        sampling = recipe.sampling
        if isinstance(sampling, MaskedSampling):
            sampling = dataclasses.replace(sampling, num_iterations=4)
        model = {**recipe.model, **SMALLER[recipe.kind]}
        small.append(dataclasses.replace(recipe, model=model, training=STEPS, sampling=sampling))
    return dataclasses.replace(scale, name="mini", data=DATA, recipes=tuple(small))


MINI = miniature()


@dataclasses.dataclass(frozen=True)
class World:
    """A working directory with the miniature's data, trained weights, and results of one reproduction."""

    root: Path
    logs: dict[str, dict[str, Any]]
    results: Results

    @property
    def weights(self) -> Path:
        return self.root / "runs" / "weights"

    @property
    def reference(self) -> Path:
        return self.root / "first" / "results.json"


@functools.cache
def some_digits(split: str, per_class: int) -> Dataset:
    dataset = load_images("digits", split)
    count = len(dataset) // 10
    return dataset.select([c * count + i for c in range(10) for i in range(per_class)])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        (root / DATA).mkdir()
        some_digits("train", 6).to_parquet(root / DATA / "train.parquet")
        some_digits("test", 3).to_parquet(root / DATA / "test.parquet")
        torch.manual_seed(1234)  # nothing below may depend on it
        logs = {
            name: train_recipe(MINI, name, weights="runs/weights", runs="runs", show_progress=False) for name in TRAINED
        }
        measured, _ = reproduce_scale(MINI, weights="runs/weights", out="first", reference=None, num_images=20)
        yield World(root, logs, measured)


@pytest.fixture
def run(
    world: World, monkeypatch: pytest.MonkeyPatch, run_command: Callable[..., tuple[int, str, str]]
) -> Callable[..., tuple[int, str, str]]:
    """Return `run_command`, with the miniature as a scale."""
    monkeypatch.setitem(recipes.SCALES, "mini", MINI)
    return run_command


# ---------------------------------------------------------------- training


def test_training_leaves_models_that_load(world: World) -> None:
    for name in TRAINED:
        files = sorted(path.name for path in (world.weights / name).iterdir())
        assert files == ["config.json", WEIGHTS_FILE]
        run_files = sorted(path.name for path in (world.root / "runs" / name).iterdir())
        assert run_files == ["checkpoint.pt", "loss.json", "loss.png"]
        assert world.logs[name]["loss"][-1][0] == 5
        model = load(MINI.recipe(name), world.weights)
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_saved_models_are_the_trained_ones_in_half_precision(world: World) -> None:
    for name in TRAINED:
        shadow = torch.load(world.root / "runs" / name / "checkpoint.pt", weights_only=True)["ema"]["shadow_params"]
        loaded = list(load(MINI.recipe(name), world.weights).parameters())
        assert len(loaded) == len(shadow)
        for ours, trained in zip(loaded, shadow, strict=True):
            assert torch.equal(ours, trained.half().float())


@pytest.mark.parametrize("gain", [None, 5.0])
def test_scaling_makes_latents_of_unit_variance(world: World, gain: float | None) -> None:
    """The untrained model's latents have nearly unit variance already, so they are also made larger."""
    vae = load(MINI.recipe("vae"), world.weights)
    factor = vae.config.scaling_factor
    dataset = experiment.images_of(MINI, "train")
    with torch.no_grad():
        if gain is not None:
            vae.quant_conv.weight[:4] *= gain  # the four channels of the mean
            factor = experiment._measure_scaling(vae, dataset)
            assert factor < 0.9
        torch.manual_seed(5)
        latents = vae.encode(dataset[:]["images"]).latent_dist.sample() * factor
    # 60 images of 64 latents: another draw of the posterior moves the deviation by 1 / sqrt(2 * 3840) = 1%.
    assert latents.std().item() == pytest.approx(1.0, abs=0.04)


def test_generator_has_the_measured_channel_order(world: World) -> None:
    order = json.loads((world.weights / "tokenbridge-64" / "config.json").read_text())["channel_order"]
    assert sorted(order) == [0, 1, 2, 3]
    assert tuple(order) == load(MINI.recipe("tokenbridge-64"), world.weights).channel_order


def test_training_again_gives_the_same_weights(world: World, tmp_path: Path) -> None:
    for name in TRAINED:
        train_recipe(MINI, name, weights=tmp_path / "weights", runs=tmp_path, show_progress=False)
        assert sha256_of(tmp_path / "weights" / name / WEIGHTS_FILE) == sha256_of(world.weights / name / WEIGHTS_FILE)


def test_initial_weights_come_from_the_seed() -> None:
    recipe = MINI.recipe("classifier")
    first, again = build(recipe), build(recipe)
    other = build(dataclasses.replace(recipe, training=dataclasses.replace(STEPS, seed=1)))
    assert torch.equal(first.to_logits.weight, again.to_logits.weight)
    assert not torch.equal(first.to_logits.weight, other.to_logits.weight)


def test_generator_without_autoencoder(world: World, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "weights" / "vae" / WEIGHTS_FILE))):
        train_recipe(MINI, "tokenbridge-64", weights=tmp_path / "weights", runs=tmp_path, show_progress=False)


def test_generator_follows_a_retrained_autoencoder(world: World, tmp_path: Path) -> None:
    """Cached latents belong to the autoencoder that made them: another one needs others."""
    changed = dataclasses.replace(MINI.recipe("vae"), training=dataclasses.replace(STEPS, seed=7))
    scale = dataclasses.replace(MINI, recipes=(changed, *MINI.recipes[1:]))
    for some, vae_runs in ((MINI, "a"), (scale, "b")):
        train_recipe(some, "vae", weights=tmp_path / "weights", runs=tmp_path / vae_runs, show_progress=False)
        table = experiment.latents_of(some, tmp_path / "weights", tmp_path / "latents")
        vae = load(some.recipe("vae"), tmp_path / "weights")
        with torch.no_grad():
            expected = vae.encode(experiment.images_of(some, "train")[:4]["images"]).latent_dist.parameters
        # Another batch size: float32 rounding of activations of order 1; two autoencoders differ by 1e-1.
        torch.testing.assert_close(table[:4]["moments"], expected, rtol=0, atol=1e-3)


# ---------------------------------------------------------------- reproduction


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
        model = load(MINI.recipe(name), world.weights)
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
        reproduce_scale(MINI, weights=tmp_path / "weights", out=tmp_path, reference=None, num_images=10)


def test_main_system_missing_is_not_run_like_the_others(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.weights, tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights" / "tokenbridge-64")
    found, _ = reproduce_scale(MINI, weights=tmp_path / "weights", out=tmp_path, reference=None, num_images=10)
    assert {row.id for row in found.rows if row.not_run} >= {"table3/tokenbridge", "table5/cached"}


# ---------------------------------------------------------------- the command


def test_help_of_all_commands(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("--help")
    assert code == 0
    commands = [
        command.callback.__name__.replace("_", "-")
        for command in options.app.registered_commands
        if command.callback and not command.hidden
    ]
    assert {"reproduce", "train", "sample", "reconstruct"} <= set(commands)
    for command in commands:
        assert command in out
        code, text, _ = run(command, "--help")
        assert code == 0
        assert re.search(rf"Usage: .*\b{command} \[OPTIONS\]", text)


def test_unknown_command_and_option(run: Callable[..., tuple[int, str, str]]) -> None:
    for arguments in (["reporduce"], ["reproduce", "mini", "--num-image", "3"], ["reproduce", "mini", "--seed", "x"]):
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        assert "Error" in err


@pytest.mark.parametrize("command", ["discrepancies", "train"])
def test_unknown_scale(run: Callable[..., tuple[int, str, str]], command: str) -> None:
    message = error_of(run(command, "huge"))
    assert "Unknown scale 'huge'; there are tiny, small, mini." in message


def test_unknown_recipe(run: Callable[..., tuple[int, str, str]]) -> None:
    message = error_of(run("train", "tiny", "nonsense"))
    assert "Unknown recipe 'nonsense' at scale tiny" in message
    assert "tokenbridge-64" in message


def test_missing_weights(run: Callable[..., tuple[int, str, str]], world: World, tmp_path: Path) -> None:
    message = error_of(run("reproduce", "mini", "--weights", tmp_path / "none", "--reference", world.reference))
    assert str(tmp_path / "none" / "classifier" / WEIGHTS_FILE) in message
    assert "tokenbridge train" in message


def test_bad_reference_is_found_before_anything_runs(
    run: Callable[..., tuple[int, str, str]], world: World, tmp_path: Path
) -> None:
    (tmp_path / "cut.json").write_text(world.reference.read_text()[:-100])
    for path, what in ((tmp_path / "cut.json", "not JSON"), (tmp_path / "none.json", "no result file")):
        code, out, err = run("reproduce", "mini", "--weights", world.weights, "--reference", path)
        message = error_of((code, out, err))
        assert what in message
        assert str(path) in message
        assert "Table 1" not in err


def test_number_of_images_is_a_multiple_of_the_classes(run: Callable[..., tuple[int, str, str]], world: World) -> None:
    for number in ("7", "0", "-10"):
        message = error_of(run("reproduce", "mini", "--num-images", number, "--reference", world.reference))
        assert "multiple of 10 classes" in message


def test_message_may_hold_brackets(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Brackets in a path are no markup, neither the kind that vanishes nor the kind that is an error."""
    for name in ("[bold]", "[1]", "a [", "[red"):
        message = error_of(run("reproduce", "mini", "--reference", tmp_path / name))
        assert str(tmp_path / name) in message


def reproduce_arguments(world: World, out: Path, reference: Path) -> list[str | Path]:
    return [
        *("reproduce", "mini", "--weights", world.weights, "--out", out),
        *("--reference", reference, "--num-images", "20"),
    ]


def write_signed(path: Path, value: dict[str, Any]) -> None:
    """Write a result file with the digest of what is now in it."""
    path.write_text(json.dumps({**value, "sha256": digest_of(value)}))


@pytest.fixture
def own_times(monkeypatch: pytest.MonkeyPatch, world: World, tmp_path: Path) -> Path:
    """Fix the times of table 5, and return the first results with these times in them."""
    slow, fast = [4.0, 4.5, 5.0], [1.0, 1.5, 2.0]
    times = itertools.cycle([slow, fast, slow, fast, fast])  # uncached, cached, diffusion, mixture, softmax
    monkeypatch.setattr("tokenbridge.reproduction.timing._milliseconds", lambda function, runs: next(times))
    value = json.loads(world.reference.read_text())
    for row in value["rows"]:
        if row["id"].startswith("table5"):
            ratio = 1.0 if row["id"].endswith(("uncached", "diffusion")) else 3.0
            row["metrics"] |= {name: ratio for name in ("speed-up", "against diffusion") if name in row["metrics"]}
    path = tmp_path / "reference.json"
    write_signed(path, value)
    return path


def test_reproduced_is_exit_0_and_json_is_json(
    run: Callable[..., tuple[int, str, str]], world: World, tmp_path: Path, own_times: Path
) -> None:
    code, out, err = run(*reproduce_arguments(world, tmp_path / "out", own_times), "--json")
    value = json.loads(out)  # and nothing else on stdout
    assert code == 0
    judged = {entry["id"]: entry["verdict"] for entry in value.pop("verdicts")}
    assert set(judged.values()) == {"reproduced", "not run"}
    assert list(judged) == [row.id for row in world.results.rows]
    assert Results.model_validate(value) == read(tmp_path / "out" / "results.json")
    assert value["provenance"]["command"].startswith("tokenbridge reproduce mini --weights")
    assert "Table 1: reconstruction" in err
    assert "Not run: Files are missing. generator of mini/parallel-64: there is no " in err


def test_tampered_number_is_exit_1_and_named(
    run: Callable[..., tuple[int, str, str]], world: World, tmp_path: Path, own_times: Path
) -> None:
    value = json.loads(own_times.read_text())
    [row] = [row for row in value["rows"] if row["id"] == "table1a/ptq-16"]
    row["metrics"]["PSNR"] += 0.06  # the tolerance is 0.05
    write_signed(own_times, value)
    code, out, _ = run(*reproduce_arguments(world, tmp_path / "out", own_times))
    assert code == 1
    assert re.search(r"^table1a/ptq-16: not reproduced: PSNR [\d.]+ against [\d.]+$", out, re.MULTILINE)
    assert re.search(r"^24 reproduced, 1 not reproduced, 5 not run\.", out, re.MULTILINE)
    assert "Table 1a." in out
    assert "The paper's argument at this scale" in out
    for text in ("post-training, 16 levels", "FID-digits", "seconds per image"):
        assert text in out  # nothing is cut off where there is no terminal
    page = (tmp_path / "out" / "tables.md").read_text()
    assert "- post-training, 16 levels: not reproduced: PSNR" in page


def test_reasons_may_hold_brackets(
    run: Callable[..., tuple[int, str, str]], world: World, tmp_path: Path, own_times: Path
) -> None:
    """A reason may hold anything: brackets are no markup."""
    value = json.loads(own_times.read_text())
    extra = {"id": "table9/[dim]a[/b]", "label": "[", "metrics": {"PSNR": 1.0}, "not_run": None}
    write_signed(own_times, {**value, "rows": [*value["rows"], extra]})
    code, out, err = run(*reproduce_arguments(world, tmp_path / "out", own_times))
    assert "Traceback" not in err
    assert code == 1
    assert "table9/[dim]a[/b]: not reproduced: only the reference has this row" in out


def test_train_one_recipe(run: Callable[..., tuple[int, str, str]], world: World, tmp_path: Path) -> None:
    code, out, err = run("train", "mini", "classifier", "--out", tmp_path)
    assert code == 0
    assert re.match(r"classifier: loss \d+\.\d{4} after \d+ s, in ", out)
    assert "train classifier: step 5 of 5" in err
    expected = sha256_of(world.weights / "classifier" / WEIGHTS_FILE)
    assert sha256_of(tmp_path / "weights" / "classifier" / WEIGHTS_FILE) == expected


def test_train_all_runs_generators_last(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[list[str]] = []

    def note(arguments: list[str]) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr("tokenbridge.training.scale.run_command", note)
    monkeypatch.setattr("tokenbridge.training.scale.latents_of", lambda *_: calls.append(["latents"]))
    code, _, _ = run("train", "mini", "--out", tmp_path, "--jobs", "1", "--data", DATA)
    assert code == 0
    optional = [recipe.name for recipe in MINI.recipes if recipe.optional]
    latents = calls.pop(calls.index(["latents"]))
    assert latents  # cached once, before the generators want them
    names = [call[2] for call in calls]
    assert sorted(names) == sorted({*TRAINED, *NOT_TRAINED} - set(optional))
    is_generator = [MINI.recipe(name).is_generator for name in names]
    assert is_generator == sorted(is_generator)
    assert {tuple(call[:2] + call[3:]) for call in calls} == {("train", "mini", "--out", str(tmp_path), "--data", DATA)}


def test_codes_need_no_latents(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """LlamaGen is trained on the codes of a VQ tokenizer: no VAE is asked for, which might not be there."""
    calls: list[str] = []

    def note(arguments: list[str]) -> int:
        calls.append(arguments[2])
        return 0

    monkeypatch.setattr("tokenbridge.training.scale.run_command", note)
    code, _, err = run("train", "mini", "vq", "llamagen", "--out", tmp_path)
    assert code == 0, err
    assert calls == ["vq", "llamagen"]


def test_failed_training_stops_before_generators(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []

    def fail(arguments: list[str]) -> int:
        calls.append(arguments[2])
        return 2 if arguments[2] == "vae" else 0

    monkeypatch.setattr("tokenbridge.training.scale.run_command", fail)
    message = error_of(run("train", "mini", "--out", tmp_path, "--jobs", "2"))
    assert "1 of 3 trainings failed" in message
    assert sorted(calls) == ["classifier", "vae", "vq"]


def test_trainings_in_processes_pass_on_what_they_say(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command_itself(["train", "tiny", "nonsense"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "Unknown recipe 'nonsense'" in err


def test_other_data_in_the_same_folder_is_not_taken_for_the_same(
    run: Callable[..., tuple[int, str, str]], world: World, tmp_path: Path
) -> None:
    """`--data` with as many other images is another run: its weights must not be the first ones."""
    (tmp_path / "other").mkdir()
    last = some_digits("train", 12)
    other = last.select([c * 12 + 6 + i for c in range(10) for i in range(6)])
    other.to_parquet(tmp_path / "other" / "train.parquet")
    assert run("train", "mini", "classifier", "--out", tmp_path / "runs")[0] == 0
    weights = tmp_path / "runs" / "weights" / "classifier" / WEIGHTS_FILE
    first = sha256_of(weights)
    code, _, _ = run("train", "mini", "classifier", "--out", tmp_path / "runs", "--data", tmp_path / "other")
    assert code == 2 or sha256_of(weights) != first


# ---------------------------------------------------------------- samples


def test_sample(run: Callable[..., tuple[int, str, str]], world: World, tmp_path: Path) -> None:
    arguments = ["sample", "mini/tokenbridge-64", "--weights", world.weights, "--num-images", "5"]
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        code, out, _ = run(*arguments, "--num-iterations", "3", "--seed", seed, "--out", tmp_path / name)
        assert code == 0
        assert "5 images" in out
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["grid.png", "images", "run.json"]
    names = [f"{number:06d}.png" for number in range(5)]
    assert sorted(path.name for path in (tmp_path / "a" / "images").iterdir()) == names
    images = {folder: [(tmp_path / folder / "images" / name).read_bytes() for name in names] for folder in "abc"}
    assert images["a"] == images["b"]
    assert images["a"] != images["c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-images", "0"], "number of images must be at least 1"),
        (["--label", "10"], "There is no class 10"),
        (["--labels", "1,-1"], "There is no class -1"),
        (["--labels", "1,one"], "Labels are whole numbers"),
        (["--labels", "1,2", "--num-images", "3"], "2 labels for 3 images"),
        (["--labels", "1,2", "--label", "1"], "name one of them"),
        (["--guidance-scale", "-0.5"], "guidance scale must be at least 0"),
        (["--temperature", "-1"], "temperature must be at least 0"),
        (["--num-iterations", "17"], "number of iterations must be in [1, 16], not 17"),
        (["--num-iterations", "0"], "number of iterations must be at least 1"),
        (
            ["--position-order", "spiral"],
            "The setting position_order of mini/tokenbridge-64 cannot be 'spiral': Input should be",
        ),
        (["--batch-size", "0"], "batch size must be at least 1"),
        (["--variant", "paper"], "no variants"),
        (["--preset", "tokenbridge-l"], "no path 'mini/tokenbridge-64'"),
    ],
)
def test_sample_refuses(
    run: Callable[..., tuple[int, str, str]], world: World, options: list[str], message: str, tmp_path: Path
) -> None:
    arguments = ["sample", "mini/tokenbridge-64", "--weights", world.weights, "--out", tmp_path / "out"]
    assert message in error_of(run(*arguments, *options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "choices"),
    [("--randomness", ("per-image", "official")), ("--format", ("png", "npz")), ("--dtype", ("fp32", "bf16", "fp16"))],
)
def test_sample_names_the_choices(
    run: Callable[..., tuple[int, str, str]], option: str, choices: tuple[str, ...], tmp_path: Path
) -> None:
    code, out, err = run("sample", "mini/tokenbridge-64", option, "other", "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert f"Invalid value for '{option}'" in err
    assert all(f"'{choice}'" in err for choice in choices)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mini/vae", "'mini/vae' is not a generator"),
        ("mini/nonsense", "Unknown recipe 'nonsense' at scale mini"),
        ("tokenbridge-xl", "Unknown model 'tokenbridge-xl'; there are tokenbridge-b, tokenbridge-l"),
        ("tokenbridge-b", "No sampling settings were published for tokenbridge-b"),
        (".", "is a path: name the model that it holds with --preset"),
    ],
)
def test_sample_wants_a_generator(run: Callable[..., tuple[int, str, str]], model: str, message: str) -> None:
    assert message in error_of(run("sample", model))


@pytest.mark.parametrize(
    "words",
    [
        ("--temperature", "0.5", "--guidance-scale=2", "tiny/tokenbridge-64"),
        ("tiny/tokenbridge-64", "--guidance-scale", "2", "--temperature=0.5"),
        ("--temperature=0.5", "--guidance-scale=2"),  # the default model has the same settings
    ],
)
def test_settings_are_options_wherever_they_stand(run_command: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    options = ("--num-images", "2", "--num-iterations", "2", "--label", "1", "--out", tmp_path)
    code, _, err = run_command("sample", *words, *options)
    assert code == 0, err
    settings = json.loads((tmp_path / "run.json").read_text())["recipe"]["sampler"]["sampling"]
    assert (settings["temperature"], settings["guidance_scale"], settings["num_iterations"]) == (0.5, 2.0, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--temperature", "yes"), "temperature of tiny/mar cannot be 'yes'"),
        (("--temperature", "-1"), "temperature must be at least 0"),
        (("--num-diffusion-steps", "foo"), "diffusion steps"),
        (("--planx", "3"), "has no setting planx"),
        (("--planx",), "The option --planx needs a value"),
        (("--randomness", "official", "--seed", str(2**32)), "below 2**32"),
    ],
)
def test_settings_that_cannot_be_are_refused(run_command: Run, words: tuple[str, ...], message: str) -> None:
    assert message in error_of(run_command("sample", "tiny/mar", *words))
