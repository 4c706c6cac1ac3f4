"""The diffusers pipeline: the images of `sample_images`, class names, seeds, and a folder that gives it all back."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_model
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from official_files import declare_small_models, small_vae, write_checkpoint, write_kl16
from official_names import to_official
from PIL import Image
from safetensors.torch import load_file, save_file
from samplers import sample_images
from torch import Tensor

import tokenbridge
from tokenbridge.data.images import pixels_to_images
from tokenbridge.models.tokenbridge.presets import PRESETS
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling
from tokenbridge.sampling.pipeline import TokenBridgePipeline, class_number, convert_pipeline, imagenet_labels
from tokenbridge.tokenizers.base import LatentTokenizer
from tokenbridge.utils.errors import UnusableImageError
from tokenbridge.weights.diffusers import WEIGHTS_FILE

NAMES = {0: "zero, nought", 1: "one", 2: "two", 3: "three", 4: "four"}
DEFAULTS = TokenBridgeSampling(
    num_iterations=3, guidance_scale=2.0, temperature=0.9, first_element="training-consistent"
)


def make_pipeline(**changes: Any) -> TokenBridgePipeline:
    parts = {
        "transformer": tiny_model(),
        "vae": small_vae(),
        "id2label": NAMES,
        "sampling": dataclasses.asdict(DEFAULTS),
    }
    pipeline = TokenBridgePipeline(**{**parts, **changes})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PIPELINE = make_pipeline()


def expected_pixels(labels: list[int], seed: int, **changes: Any) -> Tensor:
    """Return what `sample_images` makes, uint8 [N, C, H, W]."""
    config = dataclasses.replace(DEFAULTS, **changes)
    tokenizer = LatentTokenizer(PIPELINE.vae)
    return sample_images("tokenbridge", PIPELINE.transformer, tokenizer, config, torch.tensor(labels), seed)


def pixels_of(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------- images


@settings(max_examples=10)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    seed=st.integers(0, 2**63),
    guidance_scale=st.sampled_from([0.0, 1.0, 3.5]),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    num_iterations=st.integers(1, 16),
)
def test_images_are_those_of_sample_images(labels: list[int], seed: int, **settings_of_call: Any) -> None:
    images = PIPELINE(labels, seed=seed, **settings_of_call).images
    assert torch.equal(pixels_of(images), expected_pixels(labels, seed, **settings_of_call))


def test_defaults_are_those_of_the_configuration() -> None:
    assert torch.equal(pixels_of(PIPELINE([1, 2], seed=5).images), expected_pixels([1, 2], 5))
    other = make_pipeline(sampling=dataclasses.asdict(dataclasses.replace(DEFAULTS, position_order="raster")))
    assert torch.equal(pixels_of(other([1, 2], seed=5).images), expected_pixels([1, 2], 5, position_order="raster"))
    plain = make_pipeline(sampling=None).config.sampling
    assert plain == dataclasses.asdict(TokenBridgeSampling())


@pytest.mark.parametrize("change", [{"guidance_scale": 5.0}, {"temperature": 0.2}, {"num_iterations": 9}, {"seed": 6}])
def test_every_setting_changes_the_images(change: dict[str, Any]) -> None:
    """The control of the tests above: no argument is ignored."""
    call = {"seed": 5, **change}
    assert not torch.equal(pixels_of(PIPELINE([1, 2], **call).images), expected_pixels([1, 2], 5))


def test_a_seed_for_each_image_gives_what_it_gives_alone() -> None:
    together = PIPELINE([3, 1, 3], seed=[7, 8, 8]).images
    alone = [PIPELINE(label, seed=seed).images[0] for label, seed in ((3, 7), (1, 8), (3, 8))]
    assert all(a == b for a, b in zip(together, alone, strict=True))
    assert together[0] != together[2]
    assert PIPELINE([3, 3], seed=7).images[1] != PIPELINE([3, 3], seed=[7, 7]).images[1]  # (7, 1) against (7, 0)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_decoder_that_overflows_is_an_error(output_type: Any) -> None:
    pipeline = make_pipeline()
    last = [module for module in pipeline.vae.decoder.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    torch.nn.init.constant_(last.weight, 3e38)
    with pytest.raises(UnusableImageError, match="NaN or infinite"):
        pipeline([0], seed=1, output_type=output_type)


def test_output_types() -> None:
    pixels = expected_pixels([4, 0], 3)
    tensor = PIPELINE([4, 0], seed=3, output_type="pt").images
    array = PIPELINE([4, 0], seed=3, output_type="np").images
    assert tensor.shape == (2, 3, 8, 8)
    assert not tensor.is_inference()  # a user may go on with it
    assert array.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert (tensor - (pixels_to_images(pixels) + 1) / 2).abs().max() <= 0.5 / 255 + 1e-6  # `pil` rounds


def test_grey_images() -> None:
    vae = AutoencoderKL(in_channels=1, out_channels=1, latent_channels=4, sample_size=4)
    image = make_pipeline(vae=vae)("two").images[0]
    assert (image.mode, image.size) == ("L", (4, 4))


def test_precision() -> None:
    """The same tokens but for rounding in double precision; finite images in half."""
    double = make_pipeline().to(torch.float64)
    assert {double.transformer.dtype, double.vae.dtype} == {torch.float64}
    ours = PIPELINE([0, 1, 2], seed=1, output_type="pt").images
    assert (double([0, 1, 2], seed=1, output_type="pt").images - ours).abs().max() < 1e-3
    half = make_pipeline().to(torch.bfloat16)([0, 1, 2], seed=1, output_type="np").images
    assert half.shape == (3, 8, 8, 3)
    assert np.isfinite(half).all()


def test_progress(capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = make_pipeline()
    pipeline("one", num_iterations=7)
    assert capfd.readouterr().err == ""
    pipeline.set_progress_bar_config(desc="images", ascii=True)
    pipeline("one", num_iterations=7)
    out, err = capfd.readouterr()
    assert out == ""
    assert "images: 100%" in err
    assert "7/7" in err


# -------------------------------------------------------------------------------------------------- names


def test_imagenet_names() -> None:
    labels = imagenet_labels()
    assert sorted(labels) == list(range(1000))
    assert all(class_number(name, labels) == number for number, name in labels.items())
    assert class_number("Golden Retriever ", labels) == 207
    assert class_number("Cardigan", labels) == 264  # the Welsh corgi
    assert class_number("cardigan", labels) == 474


def test_names_and_numbers_go_together() -> None:
    assert PIPELINE.class_numbers(["one", 3, "ZERO", "nought", np.int64(2)]) == [1, 3, 0, 0, 2]  # type: ignore[list-item]
    assert PIPELINE.class_numbers("four") == [4]
    assert PIPELINE.class_numbers(torch.tensor([4, 1])) == [4, 1]  # type: ignore[arg-type]
    assert PIPELINE("nought", seed=2).images == PIPELINE(0, seed=2).images


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("golden retreiver", r"no class 'golden retreiver'; similar: 'golden retriever'"),
        ("retriever", r"similar: 'flat-coated retriever', 'curly-coated retriever', 'golden retriever'"),
        ("qqqqq", r"There is no class 'qqqqq'\.$"),
        ("", r"There is no class ''\.$"),
        ("CARDIGAN", r"'CARDIGAN' may mean class 264 \(Cardigan\) or class 474 \(cardigan\); give the number"),
    ],
)
def test_names_that_are_no_class(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_number(name, imagenet_labels())


def test_a_name_of_two_classes_is_refused() -> None:
    """As in ImageNet's own synonyms: a crane is a bird and a machine."""
    with pytest.raises(ValueError, match=r"class 134 \(crane\) or class 517 \(crane\)"):
        class_number("crane", {134: "crane", 517: "crane"})
    assert class_number("Crane", {134: "crane, heron", 135: "machine"}) == 134
    assert class_number("crane", {134: "crane, Crane"}) == 134  # twice the same class


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": [5]}, r"\[5, 5\], but the model has the classes 0 to 4"),
        ({"class_labels": -1}, r"\[-1, -1\], but"),
        ({"class_labels": []}, "at least 1"),
        ({"class_labels": "five"}, "There is no class 'five'"),
        ({"class_labels": 0, "guidance_scale": -0.5}, "guidance scale"),
        ({"class_labels": 0, "temperature": float("nan")}, "temperature"),
        ({"class_labels": 0, "num_iterations": 17}, r"in \[1, 16\], not 17"),
        ({"class_labels": 0, "num_iterations": 0}, "at least 1, not 0"),
        ({"class_labels": [0, 1], "seed": [1]}, "1 seeds for 2 images"),
        ({"class_labels": 0, "seed": -1}, "seed must be at least 0"),
        ({"class_labels": 0, "output_type": "latent"}, "Unknown output type 'latent'"),
    ],
)
def test_bad_calls(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PIPELINE(**call)


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="4 latent channels, the transformer 6"):
        make_pipeline(transformer=tiny_model(num_channels=6, channel_order=tuple(range(6))))
    with pytest.raises(ValueError, match="Class 5 has a name; the transformer has 5 classes"):
        make_pipeline(id2label={**NAMES, 5: "five"})
    with pytest.raises(ValueError, match="guidance scale"):
        make_pipeline(sampling={"guidance_scale": -1})
    with pytest.raises(ValueError, match="have no names; give a number instead of 'one'"):
        make_pipeline(id2label=None)("one")


# ------------------------------------------------------------------------------------------------ folders


def test_a_folder_gives_the_pipeline_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    PIPELINE.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "TokenBridgePipeline"
    assert index["transformer"] == ["tokenbridge", "TokenBridge"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    capfd.readouterr()
    again = TokenBridgePipeline.from_pretrained(tmp_path)
    assert "Expected types" not in capfd.readouterr().err
    assert again.config.id2label == PIPELINE.config.id2label
    assert again.config.sampling == PIPELINE.config.sampling
    for name in ("transformer", "vae"):
        ours, theirs = getattr(PIPELINE, name).state_dict(), getattr(again, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert not getattr(again, name).training
    assert again(["nought", 3], seed=4).images == PIPELINE([0, 3], seed=4).images
    half = TokenBridgePipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert {half.transformer.dtype, half.vae.dtype} == {torch.float16}
    with pytest.raises(ValueError, match="4 latent channels, the transformer 6"):
        TokenBridgePipeline.from_pretrained(
            tmp_path, transformer=tiny_model(num_channels=6, channel_order=tuple(range(6)))
        )


def test_the_folder_loads_in_a_fresh_process(tmp_path: Path) -> None:
    """diffusers imports no module that a folder names: `import tokenbridge` must be all that a user needs."""
    PIPELINE.save_pretrained(tmp_path / "folder")
    code = (
        "import sys, tokenbridge; folder, out = sys.argv[1:];"
        "pipeline = tokenbridge.TokenBridgePipeline.from_pretrained(folder);"
        "pipeline('nought', seed=4).images[0].save(out)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "folder"), str(tmp_path / "image.png")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(tmp_path / "image.png") as image:
        assert torch.equal(pixels_of([image]), expected_pixels([0], 4))


@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path, name: str) -> None:
    """diffusers alone goes on with what is there."""
    PIPELINE.save_pretrained(tmp_path)
    path = tmp_path / name / WEIGHTS_FILE
    state = load_file(path)
    lost = next(key for key in state if key.endswith("bias"))
    save_file({key: value for key, value in state.items() if key != lost}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} lacks 1 weights: \['{lost}'\]"):
        TokenBridgePipeline.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------- official files


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path, Path]:
    """Return the arguments of `from_preset`: a preset as small as the tests' model, and its official files."""
    name = declare_small_models(monkeypatch)
    return name, write_checkpoint(tmp_path / "checkpoint-last.pth"), write_kl16(tmp_path / "kl16.ckpt")


def test_a_preset_and_its_official_files(official: tuple[str, Path, Path]) -> None:
    pipeline = TokenBridgePipeline.from_preset(*official)
    settings_of_preset: dict[str, Any] = {"num_iterations": 4, "guidance_scale": 2.0, "temperature": 1.0}
    assert pipeline.config.sampling == dataclasses.asdict(TokenBridgeSampling(**settings_of_preset))
    expected = make_pipeline(sampling=settings_of_preset)([1, 4], seed=9).images
    assert pipeline([1, 4], seed=9).images == expected
    paper = TokenBridgePipeline.from_preset(*official, variant="paper")
    assert paper.config.sampling["num_iterations"] == 3
    with pytest.raises(ValueError, match="no sampling settings 'article'"):
        TokenBridgePipeline.from_preset(*official, variant="article")


def test_published_presets_have_imagenet_names(
    official: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, checkpoint, vae = official
    large = TINY | {"num_classes": 1000}
    model = tiny_model(**large)
    torch.save({"model_ema": to_official(model)}, checkpoint)
    count = sum(parameter.numel() for parameter in model.parameters())
    preset = dataclasses.replace(
        PRESETS[name], model=large, num_parameters=count, official_name="test_official", sampling={}
    )
    monkeypatch.setitem(PRESETS, name, preset)
    pipeline = TokenBridgePipeline.from_preset(name, checkpoint, vae)
    assert pipeline.class_numbers("golden retriever") == [207]
    assert pipeline.config.sampling == dataclasses.asdict(TokenBridgeSampling())  # none were published of this one


def test_conversion_to_a_pipeline_folder(official: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, checkpoint, vae = official
    convert_pipeline(checkpoint, vae, tmp_path / "folder", name)
    with pytest.raises(ValueError, match="already holds a converted model"):
        convert_pipeline(checkpoint, vae, tmp_path / "folder", name)
    convert_pipeline(checkpoint, vae, tmp_path / "folder", name, overwrite=True)
    again = TokenBridgePipeline.from_pretrained(tmp_path / "folder")
    again.set_progress_bar_config(disable=True)
    expected = TokenBridgePipeline.from_preset(name, checkpoint, vae)([1, 4], seed=9).images
    assert again([1, 4], seed=9).images == expected
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        convert_pipeline(checkpoint, vae, tmp_path, name)


def test_the_package_exports_it() -> None:
    exported: Callable[..., Any] = tokenbridge.TokenBridgePipeline
    assert exported is TokenBridgePipeline
