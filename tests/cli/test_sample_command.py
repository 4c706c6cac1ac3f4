"""`tokenbridge sample`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Run, error_of
from mini_scale import World


def test_sample(run: Run, world: World, tmp_path: Path) -> None:
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
def test_sample_refuses(run: Run, world: World, options: list[str], message: str, tmp_path: Path) -> None:
    arguments = ["sample", "mini/tokenbridge-64", "--weights", world.weights, "--out", tmp_path / "out"]
    assert message in error_of(run(*arguments, *options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "choices"),
    [("--randomness", ("per-image", "official")), ("--format", ("png", "npz")), ("--dtype", ("fp32", "bf16", "fp16"))],
)
def test_sample_names_the_choices(run: Run, option: str, choices: tuple[str, ...], tmp_path: Path) -> None:
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
def test_sample_wants_a_generator(run: Run, model: str, message: str) -> None:
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
