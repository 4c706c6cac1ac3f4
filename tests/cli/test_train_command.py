"""`tokenbridge train`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Run, error_of
from mini_scale import DATA, MINI, NOT_TRAINED, TRAINED, World, some_digits
from safetensors.torch import load_file, save_file

from tokenbridge.results.schema import read
from tokenbridge.training.scale import run_command as run_command_itself
from tokenbridge.utils.files import references_in, sha256_of
from tokenbridge.weights.diffusers import WEIGHTS_FILE


def test_unknown_recipe(run: Run) -> None:
    message = error_of(run("train", "tiny", "nonsense"))
    assert "Unknown recipe 'nonsense' at scale tiny" in message
    assert "tokenbridge-64" in message


def test_train_one_recipe(run: Run, world: World, tmp_path: Path) -> None:
    code, out, err = run("train", "mini", "classifier", "--out", tmp_path)
    assert code == 0
    assert re.match(r"classifier: loss \d+\.\d{4} after \d+ s, in ", out)
    assert "train classifier: step 5 of 5" in err
    expected = sha256_of(world.weights / "classifier" / WEIGHTS_FILE)
    assert sha256_of(tmp_path / "weights" / "classifier" / WEIGHTS_FILE) == expected


def test_train_all_runs_generators_last(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


def test_codes_need_no_latents(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """LlamaGen is trained on the codes of a VQ tokenizer: no VAE is asked for, which might not be there."""
    calls: list[str] = []

    def note(arguments: list[str]) -> int:
        calls.append(arguments[2])
        return 0

    monkeypatch.setattr("tokenbridge.training.scale.run_command", note)
    code, _, err = run("train", "mini", "vq", "llamagen", "--out", tmp_path)
    assert code == 0, err
    assert calls == ["vq", "llamagen"]


def test_failed_training_stops_before_generators(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


def test_other_data_in_the_same_folder_is_not_taken_for_the_same(run: Run, world: World, tmp_path: Path) -> None:
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


@pytest.fixture
def shipped(world: World, tmp_path: Path) -> Iterator[Path]:
    """Let the miniature's tokenizers and classifier be shipped, and no generator."""
    folder = tmp_path / "references" / "mini" / "weights"
    folder.mkdir(parents=True)
    for name in ("vae", "vq", "classifier", "givt"):
        shutil.copytree(world.weights / name, folder / name)
    with references_in(tmp_path / "references"):
        yield folder


def test_one_generator_is_trained_and_measured_with_what_is_shipped(
    run: Run, world: World, shipped: Path, tmp_path: Path
) -> None:
    """The guide for developers: of one model alone, all rows that can be measured are."""
    mine = tmp_path / "mine"
    code, _, err = run("train", "mini", "mar", "--out", mine)
    assert code == 0, err
    assert f"The shipped vae is used, because there is none at {mine}/weights/vae." in err
    assert sorted(path.name for path in (mine / "weights").iterdir()) == ["mar"]
    expected = sha256_of(world.weights / "mar" / WEIGHTS_FILE)  # trained on the same autoencoder
    assert sha256_of(mine / "weights" / "mar" / WEIGHTS_FILE) == expected
    tokenizer = json.loads((mine / "mar" / "loss.json").read_text())["tokenizer"]
    assert tokenizer == {"name": "vae", "shipped": True, "sha256": sha256_of(shipped / "vae" / WEIGHTS_FILE)}

    code, out, err = run(
        "reproduce", "mini", "--weights", mine / "weights", "--num-images", "20", "--out", tmp_path / "tables"
    )
    assert code == 0, err
    for name in ("vae", "vq", "classifier"):
        assert err.count(f"The shipped {name} is used, because there is none at {mine}/weights/{name}.") <= 1
    results = read(tmp_path / "tables" / "results.json")
    rows = {row.id: row.not_run for row in results.rows}
    measured = [id_ for id_, reason in rows.items() if reason is None]
    assert {"table1a/vae", "table1a/vq", "table3/mar", "table3/real"} <= set(measured)
    assert "table3/givt" not in measured  # a generator is never taken from the shipped ones
    command = f"`tokenbridge train mini givt --out {mine}` makes it"
    assert rows["table3/givt"] == f"there are no weights of givt; {command}"
    assert f"table3/givt: not run: there are no weights of givt; {command}" in out
    assert results.provenance.settings["shipped models"] == ["vae", "vq", "classifier"]
    hashes = results.provenance.weights_sha256
    assert hashes[f"vae/{WEIGHTS_FILE}"] == sha256_of(shipped / "vae" / WEIGHTS_FILE)
    assert hashes[f"mar/{WEIGHTS_FILE}"] == expected


def test_the_models_own_tokenizer_comes_before_the_shipped_one(
    run: Run, world: World, shipped: Path, tmp_path: Path
) -> None:
    shutil.copytree(world.weights / "vae", tmp_path / "mine" / "weights" / "vae")
    (shipped / "vae" / WEIGHTS_FILE).write_bytes(b"would not load")
    code, _, err = run("train", "mini", "mar", "--out", tmp_path / "mine")
    assert code == 0, err
    assert "shipped" not in err
    assert json.loads((tmp_path / "mine" / "mar" / "loss.json").read_text())["tokenizer"]["shipped"] is False


def test_shipped_tokenizers_are_not_for_other_images(run: Run, shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for split in ("train", "test"):
        some_digits(split, 3).to_parquet(tmp_path / "other" / f"{split}.parquet")
    message = error_of(run("train", "mini", "mar", "--out", tmp_path / "mine", "--data", tmp_path / "other"))
    command = f"tokenbridge train mini vae --data {tmp_path}/other --out {tmp_path}/mine"
    assert "The model 'vae' is missing." in message
    assert f"`{command}` makes it." in message


def test_the_advice_for_a_scale_that_is_not_shipped_names_that_scale(run: Run) -> None:
    message = error_of(run("reproduce", "small", "--data", DATA))
    assert "No model of the scale small is in " in message
    assert "`tokenbridge train small --data mini-digits` makes them in runs/small-training/weights" in message


@pytest.mark.usefixtures("shipped")
def test_a_folder_without_models_is_not_taken_for_one_that_lacks_some(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine" / "weights" / "mar").mkdir(parents=True)
    for folder in (tmp_path / "nowhere", tmp_path / "mine", tmp_path / "mine" / "weights"):
        message = error_of(
            run("reproduce", "mini", "--weights", folder, "--num-images", "20", "--out", tmp_path / "out")
        )
        assert f"No model of the scale mini is in {folder}." in message
    assert "`tokenbridge train mini --out " in message  # of the last, which is called as `train` calls it


def test_a_generator_is_not_decoded_by_another_tokenizer_than_it_was_trained_on(
    run: Run, world: World, shipped: Path, tmp_path: Path
) -> None:
    """MAR is trained on the shipped autoencoder, and then somebody trains an autoencoder in the same folder."""
    assert run("train", "mini", "mar", "--out", tmp_path / "mine")[0] == 0
    other = tmp_path / "mine" / "weights" / "vae"
    shutil.copytree(world.weights / "vae", other)
    tensors = load_file(other / WEIGHTS_FILE)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / WEIGHTS_FILE)
    weights = tmp_path / "mine" / "weights"
    sample = ("sample", "mini/mar", "--weights", weights, "--num-images", "2", "--out", tmp_path / "images")
    message = error_of(run(*sample))
    assert f"was trained on another vae than the one in {other}, which would decode its images wrongly." in message
    reproduce = ("reproduce", "mini", "--weights", weights, "--num-images", "20")
    assert "was trained on another vae" in error_of(run(*reproduce, "--out", tmp_path / "tables"))
    assert run(*sample, "--vae", shipped / "vae")[0] == 0
