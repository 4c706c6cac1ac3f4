"""The command `reconstruct` on real photographs, through small autoencoders with random weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import skimage
import sklearn.datasets
import torch
import torch_fidelity
from conftest import REAL_DATA, Run, error_of
from diffusers import UNet2DModel
from official_files import write_quick_inception
from PIL import Image
from safetensors.torch import save_file
from scored_images import ImageDataset
from tiny_autoencoders import tiny_kl, tiny_taesd, tiny_vq
from torch import Tensor

from tokenbridge.data.sources import load_images, pixels_of
from tokenbridge.evaluation import reconstruct as reconstruction
from tokenbridge.evaluation.classifier import Classifier
from tokenbridge.evaluation.inception import Inception, load_inception
from tokenbridge.evaluation.metrics import psnr, ssim
from tokenbridge.evaluation.reconstruct import (
    inception_rfid,
    load_tokenizer_model,
    reconstruct,
    reconstruct_with,
    reconstruction_scores,
)
from tokenbridge.results.markdown import escape
from tokenbridge.results.score import Score, to_metrics
from tokenbridge.results.tolerances import metric
from tokenbridge.tokenizers.base import LatentTokenizer, VQTokenizer
from tokenbridge.tokenizers.quantizer import gaussian_quantizer
from tokenbridge.utils.devices import best_device
from tokenbridge.utils.errors import UnusableImageError
from tokenbridge.utils.files import sha256_of
from tokenbridge.weights import artifacts
from tokenbridge.weights.artifacts import INCEPTION, MissingArtifactsError

SHIPPED = (
    *(Path(skimage.__file__).parent / "data" / name for name in ("astronaut.png", "coffee.png", "chelsea.png")),
    *(Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")),
)


@pytest.fixture(autouse=True)
def no_inception(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide weights that this machine may have; keep the lock file out of the checkout."""
    monkeypatch.delenv(artifacts.FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "torch-home"))
    monkeypatch.chdir(tmp_path_factory.mktemp("working-directory"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder of five photographs of different sizes."""
    folder = tmp_path_factory.mktemp("photographs")
    for file in SHIPPED:
        shutil.copy(file, folder)
    return str(folder)


@pytest.fixture(scope="module")
def pixels(photographs: str) -> Tensor:
    return pixels_of(load_images(photographs, "test"), size=32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the folders of a saved KL, TAESD, VQ and grey KL autoencoder, and of a pipeline with a VAE."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        "kl": tiny_kl(),
        "tiny": tiny_taesd(),
        "vq": tiny_vq(),
        "grey": tiny_kl(in_channels=1, out_channels=1),
        "pipeline/vae": tiny_kl(),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in [*made, "pipeline"]}


@pytest.mark.parametrize(("name", "factor", "channels"), [("tiny", 4, 4), ("kl", 4, 6)])
def test_photographs_through_an_autoencoder(
    name: str, factor: int, channels: int, photographs: str, models: dict[str, str], pixels: Tensor, tmp_path: Path
) -> None:
    levels = (4, 16)
    report = reconstruct(photographs, tokenizer=models[name], levels=levels, image_size=32, out=tmp_path)
    assert [row.label for row in report.rows] == ["continuous", "gaussian, 4 levels", "gaussian, 16 levels"]
    for row, num_levels in zip(report.rows, (None, *levels), strict=True):
        tokenizer = LatentTokenizer(
            load_tokenizer_model(models[name]), gaussian_quantizer(num_levels) if num_levels else None
        )
        expected = torch.cat([reconstruct_with(tokenizer, pixels[i : i + 1])[0] for i in range(len(pixels))])
        # Convolutions of another batch size round differently, which can move a pixel by one.
        assert row.metrics["PSNR"] == pytest.approx(psnr(pixels, expected).mean().item(), abs=1e-3)
        assert row.metrics["SSIM"] == pytest.approx(ssim(pixels, expected).mean().item(), abs=1e-4)
        bits = {4: 2, 16: 4}.get(num_levels or 0)
        assert row.metrics.get("bits per image") == (bits and bits * channels * (32 // factor) ** 2)
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"reconstruction.{s}" for s in ("json", "md", "png")]


def test_files_say_the_same_as_the_report(photographs: str, models: dict[str, str], tmp_path: Path) -> None:
    report = reconstruct(photographs, tokenizer=models["kl"], levels=(8,), image_size=32, out=tmp_path)
    stored = json.loads((tmp_path / "reconstruction.json").read_text())
    assert stored["rows"] == [row.model_dump() for row in report.rows]
    assert stored["distortions"] == {
        "reconstruction/gaussian-8-levels": dataclasses.asdict(next(iter(report.distortions.values())))
    }
    assert stored["settings"] == report.settings
    assert stored["notes"] == report.notes
    assert stored["provenance"]["versions"]["diffusers"]
    page = (tmp_path / "reconstruction.md").read_text()
    psnr_cell = f"{report.rows[1].metrics['PSNR']:.2f}"
    assert f"| gaussian, 8 levels | {psnr_cell} |" in page
    assert all(escape(note) in page for note in report.notes)  # as text, whatever is in it
    with Image.open(tmp_path / "reconstruction.png") as picture:
        assert picture.width > picture.height  # five columns, three rows


def test_pictures_show_what_was_measured(
    photographs: str, models: dict[str, str], pixels: Tensor, tmp_path: Path
) -> None:
    with patch.object(reconstruction, "save_grid") as save_grid:
        reconstruct(photographs, tokenizer=models["kl"], levels=(8,), image_size=32, out=tmp_path)
    _, rows, names, title = save_grid.call_args.args
    assert names == ["original", "continuous", "gaussian, 8 levels"]
    assert torch.equal(rows[0], pixels)
    tokenizer = LatentTokenizer(load_tokenizer_model(models["kl"]), gaussian_quantizer(8))
    assert torch.equal(rows[2], reconstruct_with(tokenizer, pixels)[0])
    assert title.startswith("AutoencoderKL: 5 of 5 images, photographs")


@pytest.mark.parametrize("quantizer", ["gaussian", "uniform", "lloyd-max"])
def test_more_levels_distort_latents_less(
    quantizer: str, photographs: str, models: dict[str, str], tmp_path: Path
) -> None:
    report = reconstruct(
        photographs,
        tokenizer=models["kl"],
        levels=(4, 8, 16, 32),
        quantizer=quantizer,
        scale="measure",
        image_size=32,
        out=tmp_path,
    )
    errors = [d.relative_mse for d in report.distortions.values()]
    assert errors == sorted(errors, reverse=True)
    assert all(d.relative_mse >= d.lloyd_max_relative_mse - 1e-9 for d in report.distortions.values())


def test_vq_model_has_one_row_whatever_the_levels(
    photographs: str, models: dict[str, str], pixels: Tensor, tmp_path: Path
) -> None:
    report = reconstruct(photographs, tokenizer=models["vq"], levels=(8, 16), image_size=32, out=tmp_path)
    (row,) = report.rows
    assert (row.id, row.label) == ("reconstruction/vq-12-codes", "VQ, 12 codes")
    expected, bits = reconstruct_with(VQTokenizer(load_tokenizer_model(models["vq"])), pixels)
    assert row.metrics["PSNR"] == pytest.approx(psnr(pixels, expected).mean().item(), abs=1e-3)
    assert row.metrics["bits per image"] == bits
    assert not report.distortions
    assert "scale" not in report.settings


def test_parquet_and_limit(models: dict[str, str], tmp_path: Path) -> None:
    file = REAL_DATA / "cifar10" / "test.parquet"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    settings: dict[str, Any] = {"tokenizer": models["tiny"], "levels": (8,), "limit": 12}
    reports = [reconstruct(str(file), out=tmp_path, seed=seed, **settings) for seed in (0, 0, 1)]
    assert [r.settings["images"] for r in reports] == [12, 12, 12]
    first, again, other = (r.settings["images sha256"] for r in reports)
    assert first == again != other
    assert reports[0].rows == reports[1].rows


def test_grey_images(models: dict[str, str], tmp_path: Path) -> None:
    report = reconstruct("digits", tokenizer=models["grey"], levels=(8,), limit=5, out=tmp_path)
    assert report.settings["image shape"] == [1, 32, 32]
    assert len(report.rows) == 2


def test_scale(photographs: str, models: dict[str, str], tmp_path: Path) -> None:
    def run(scale: str | float) -> reconstruction.Report:
        return reconstruct(photographs, tokenizer=models["kl"], levels=(16,), scale=scale, image_size=32, out=tmp_path)

    own, measured, tenth, same = run("config"), run("measure"), run(0.02), run(2.0)
    assert own.settings["scaling factor"] == 2.0
    assert own.settings["shift factor"] == 0.25
    assert same.rows == own.rows
    (variance,) = (d.variance for d in measured.distortions.values())
    assert variance == pytest.approx(1, abs=1e-5)
    assert not any("WARNING" in note for note in measured.notes)
    (warning,) = (note for note in tenth.notes if "WARNING" in note)
    assert "scale 'measure'" in warning
    # The autoencoder itself is the same at any scale, up to float rounding.
    assert tenth.rows[0].metrics["PSNR"] == pytest.approx(own.rows[0].metrics["PSNR"], abs=1e-3)
    (bad,), (good,) = tenth.distortions.values(), measured.distortions.values()
    assert bad.relative_mse > 10 * good.relative_mse


def test_the_advised_factor_mends_the_scale(photographs: str, models: dict[str, str], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tokenizer": models["kl"], "levels": (16,), "image_size": 32, "out": tmp_path}
    bad = reconstruct(photographs, scale=0.02, **settings)
    (warning,) = (note for note in bad.notes if "WARNING" in note)
    factor = 0.02 * float(warning.split("the factor ")[1].split()[0])
    (distortion,) = reconstruct(photographs, scale=factor, **settings).distortions.values()
    assert distortion.variance == pytest.approx(1, rel=0.02)  # advised with three digits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "30 x 30 pixels.*multiples of 4.*28"),
        ({"image_size": None}, "different sizes"),
        ({"quantizer": "cubic"}, "gaussian, uniform, lloyd-max"),
        ({"scale": "guess"}, "'config', 'measure' or a positive number"),
        ({"scale": -1.0}, "'config', 'measure' or a positive number"),
        ({"levels": (1,)}, "at least 2 levels"),
        ({"limit": 0}, "at least 1 image"),
        ({"source": "/nowhere/at/all"}, "Could not load"),
    ],
)
def test_wrong_settings(
    changes: dict[str, Any], message: str, photographs: str, models: dict[str, str], tmp_path: Path
) -> None:
    settings = {"source": photographs, "tokenizer": models["kl"], "image_size": 32, "out": tmp_path / "out"}
    with pytest.raises(ValueError, match=message):
        reconstruct(**{**settings, **changes})
    assert not (tmp_path / "out").exists()


def test_models_of_every_layout_load(models: dict[str, str]) -> None:
    classes = {name: type(load_tokenizer_model(folder)).__name__ for name, folder in models.items()}
    assert classes == {
        "kl": "AutoencoderKL",
        "tiny": "AutoencoderTiny",
        "vq": "VQModel",
        "grey": "AutoencoderKL",
        "pipeline/vae": "AutoencoderKL",
        "pipeline": "AutoencoderKL",
    }


def test_loaded_model_is_float32_and_the_saved_one(tmp_path: Path) -> None:
    model = tiny_kl().half()
    model.save_pretrained(tmp_path)
    loaded = load_tokenizer_model(str(tmp_path))
    assert not loaded.training
    for name, weights in loaded.state_dict().items():
        assert weights.dtype == torch.float32
        assert torch.equal(weights, model.state_dict()[name].float())


def test_tokenizers_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer '/not/there'.*config\.json and diffusion_pytorch_model"):
        load_tokenizer_model("/not/there")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_tokenizer_model(str(tmp_path))

    UNet2DModel(
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
    ).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="UNet2DModel, not an autoencoder"):
        load_tokenizer_model(str(tmp_path / "unet"))


def test_weights_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    model = tiny_kl()
    model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(ValueError, match=r"no weights at .*diffusion_pytorch_model\.safetensors"):
        load_tokenizer_model(str(tmp_path / "pickle"))

    model.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"safetensors cannot be read as a safetensors file"):
        load_tokenizer_model(str(tmp_path / "cut"))

    weights = {name: w for name, w in model.state_dict().items() if name != "quant_conv.weight"}
    model.save_pretrained(tmp_path / "partial")
    save_file(weights, tmp_path / "partial" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights: .'quant_conv"):
        load_tokenizer_model(str(tmp_path / "partial"))


def test_batches_change_nothing(pixels: Tensor) -> None:
    tokenizer = LatentTokenizer(tiny_kl(), gaussian_quantizer(8))
    whole, bits = reconstruct_with(tokenizer, pixels)
    parts, same_bits = reconstruct_with(tokenizer, pixels, batch_size=2)
    assert whole.dtype == torch.uint8
    # Rounding differs between batch sizes: a pixel may move by one.
    assert (whole.int() - parts.int()).abs().max() <= 1
    assert bits == same_bits == 6 * 8 * 8 * 3


def reconstruction_metrics(*arguments: Any, **options: Any) -> dict[str, float]:
    return to_metrics(reconstruction_scores(*arguments, **options))


def test_metrics_have_the_names_of_the_tables(pixels: Tensor) -> None:
    torch.manual_seed(0)
    noisy = (pixels.int() + torch.randint(-9, 10, pixels.shape)).clamp(0, 255).byte()
    classifier = Classifier(in_channels=3, widths=(8, 8, 8, 8))
    metrics = reconstruction_metrics(pixels, noisy, classifier=classifier, extractor="photos", bits=12.0)
    assert list(metrics) == ["PSNR", "SSIM", "rFID-photos", "IS-photos", "bits per image"]
    assert all(metric(name) for name in metrics)
    assert metrics["rFID-photos"] > 1e-6
    equal = reconstruction_metrics(pixels, pixels, classifier=classifier, extractor="photos")
    assert equal["rFID-photos"] == pytest.approx(0, abs=1e-6)  # five images: singular covariances, roots of 1e-16
    assert list(reconstruction_metrics(pixels, noisy)) == ["PSNR", "SSIM"]


def test_exact_images_raise_the_mean_psnr(pixels: Tensor) -> None:
    noisy = pixels ^ 4
    half_exact = torch.cat([pixels[:2], noisy[2:]])
    one_off = pixels.clone()
    one_off[:, 0, 0, 0] ^= 1
    means = [reconstruction_metrics(pixels, x)["PSNR"] for x in (noisy, half_exact, one_off, pixels)]
    assert means == sorted(means)
    assert means[2] == pytest.approx(means[3])
    assert means[3] == pytest.approx(48.13 + 10 * torch.tensor(3.0 * 32 * 32).log10().item(), abs=0.01)


def test_missing_inception_weights_are_noted(photographs: str, models: dict[str, str], tmp_path: Path) -> None:
    report = reconstruct(photographs, tokenizer=models["kl"], levels=(8,), image_size=32, out=tmp_path)
    (note,) = (note for note in report.notes if note.startswith("rFID not run: "))
    assert artifacts.ARTIFACTS[INCEPTION].file in note
    assert artifacts.ARTIFACTS[INCEPTION].origin in note
    page = (tmp_path / "reconstruction.md").read_text()
    header, row = (next(line for line in page.splitlines() if start in line) for start in ("PSNR", "continuous |"))
    assert dict(zip(header.split(" | "), row.split(" | "), strict=True))["rFID"] == "–"
    assert escape(note) in page
    with pytest.raises(MissingArtifactsError, match="names /not/there"):  # asked for by name: no silent dash
        reconstruct(photographs, tokenizer=models["kl"], inception_weights="/not/there", image_size=32, out=tmp_path)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of random weights in torch-fidelity's format."""
    file = tmp_path_factory.mktemp("inception") / "random.pth"
    write_quick_inception(file)
    return file


def test_inception_rfid_is_the_frechet_distance_of_its_features(random_inception: Path, pixels: Tensor) -> None:
    grey = pixels[:4, :1]
    coarse = grey // 64 * 64
    inception = load_inception(random_inception, allow_other=True)
    with torch.no_grad():
        features = [
            inception.network(x.expand(-1, 3, -1, -1).to(best_device()))[0].double().cpu().numpy()
            for x in (coarse, grey)
        ]
    # |mean - mean|² + tr S_a + tr S_b - 2 tr sqrt(S_a S_b), from the singular values of the centred features.
    means = [x.mean(axis=0) for x in features]
    roots = [(x - mean) / np.sqrt(len(x) - 1) for x, mean in zip(features, means, strict=True)]
    trace = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    expected = ((means[0] - means[1]) ** 2).sum() + sum((root**2).sum() for root in roots) - 2 * trace
    # Four images span 3 of 512 dimensions; rounding in the other 509 costs torch-fidelity some thousandths.
    found = inception_rfid(grey, coarse, inception)
    assert found == Score("rFID", found.value, "other-inception")
    assert found.value == pytest.approx(expected, rel=1e-2)
    assert expected > 0.01


def test_inception_rfid_is_torch_fidelitys(random_inception: Path, pixels: Tensor) -> None:
    """What this package once called: torch-fidelity's own extraction and distance, by the same weights."""
    grey = pixels[:4, :1]
    coarse = grey // 64 * 64
    theirs = torch_fidelity.calculate_metrics(
        input1=ImageDataset(coarse.expand(-1, 3, -1, -1)),
        input2=ImageDataset(grey.expand(-1, 3, -1, -1)),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(random_inception),
        fid=True,
        cuda=False,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )["frechet_inception_distance"]
    inception = load_inception(random_inception, allow_other=True)
    # Its statistics are float32, ours float64, and four images leave them singular.
    assert inception_rfid(grey, coarse, inception).value == pytest.approx(theirs, rel=1e-2)


def test_rfid_fills_its_column(models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"weights")
    declared = replace(artifacts.ARTIFACTS[INCEPTION], size=7, sha256=sha256_of(weights))
    monkeypatch.setitem(artifacts.ARTIFACTS, INCEPTION, declared)
    settings: dict[str, Any] = {"tokenizer": models["grey"], "levels": (8,), "inception_weights": weights}
    network = Inception(lambda x: (x,), "", published=True)
    scores = [Score("rFID", 1.25), Score("rFID", 2.5)]
    with (
        patch.object(reconstruction, "load_inception", return_value=network) as load,
        patch.object(reconstruction, "inception_rfid", side_effect=scores) as rfid,
    ):
        report = reconstruct("digits", limit=4, out=tmp_path / "out", **settings)
        single = reconstruct("digits", limit=1, out=tmp_path / "single", **settings)
    assert [row.metrics["rFID"] for row in report.rows] == [1.25, 2.5]
    assert load.call_args.args == (weights,)
    assert rfid.call_args.args[2] is network
    assert any("rFID is of 4 images" in note for note in report.notes)
    assert "rFID" not in single.rows[0].metrics
    assert any("rFID not run" in note for note in single.notes)


@pytest.mark.parametrize("make", [tiny_kl, tiny_vq, tiny_taesd])
def test_a_decoder_that_overflows_is_an_error(make: Any, photographs: str, tmp_path: Path) -> None:
    model = make()
    last = [module for module in model.decoder.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    torch.nn.init.constant_(last.weight, 3e38)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UnusableImageError, match="NaN or infinite"):
        reconstruct(photographs, tokenizer=str(tmp_path / "model"), levels=(8,), image_size=32, out=tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_the_digits_tokenizer_is_for_digits(photographs: str, run_command: Run) -> None:
    assert "Name a tokenizer" in error_of(run_command("reconstruct", photographs, "--image-size", "32"))
