"""Discrepancies: both arms see the same seeds, each effect is what theory says, and the command measures them all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REAL_DATA, error_of, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenbridge.configs.tiny import TINY
from tokenbridge.data.images import images_to_pixels, llamagen_pixels, truncated_pixels
from tokenbridge.data.sources import load_images
from tokenbridge.models.givt import model as givt
from tokenbridge.models.givt import sampling as givt_sampling
from tokenbridge.models.givt.density import Gaussian, GuidedDensity
from tokenbridge.models.tokenbridge.checkpoint import official_buffers
from tokenbridge.models.tokenbridge.heads import ARHead
from tokenbridge.reproduction.discrepancies import baselines, precision, quantizing
from tokenbridge.reproduction.discrepancies import head as head_studies
from tokenbridge.reproduction.discrepancies import run as d
from tokenbridge.reproduction.discrepancies import sampling as discrepancies_sampling
from tokenbridge.reproduction.discrepancies.study import Arm, Study, rows_of
from tokenbridge.reproduction.small_scale import measure_samples
from tokenbridge.reproduction.workbench import MAIN_SYSTEM, open_workbench
from tokenbridge.results.schema import Row, read
from tokenbridge.results.tolerances import METRICS, metric
from tokenbridge.sampling.sample import sample_pixels
from tokenbridge.tokenizers.quantizer import gaussian_quantizer
from tokenbridge.training.train import build
from tokenbridge.utils.files import reference_folder, sha256_of
from tokenbridge.weights.diffusers import save_model

SHIPPED = reference_folder() / "tiny" / "weights"
RESULTS = reference_folder() / "discrepancies"
STAND_INS = ("givt", "llamagen")


def stand_in(name: str) -> Any:
    """Return a model of a recipe whose outputs depend on everything: at initialisation the last layers are zero."""
    model = build(TINY.recipe(name))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few digits as a folder of images, and models: the shipped ones, and stand-ins for those that are not."""
    folder = tmp_path_factory.mktemp("discrepancies")
    for split, step in (("train", 45), ("test", 25)):
        digits = load_images("digits", split)
        for i in range(0, len(digits), step):
            file = folder / "digits" / split / str(digits[i]["label"]) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            digits[i]["image"].save(file)
    for name in ("vae", "vq", "classifier", "tokenbridge-64"):
        shutil.copytree(SHIPPED / name, folder / "weights" / name)
    for name in STAND_INS:
        save_model(stand_in(name), folder / "weights" / name)
    return folder


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    scale = replace(TINY, data=str(folder / "digits"))
    return Study(open_workbench(scale, folder / "weights"), num_images=20, seed=3)


# ---------------------------------------------------------------------------------------------- the same seeds


def test_samples_and_scores_are_those_of_reproduce(study: Study) -> None:
    pixels = sample_pixels(study.bench.sampler(MAIN_SYSTEM), study.labels, 3, show_progress=False)
    ours = images_to_pixels(study.images(study.generate(study.config, study.labels, 3)))
    assert torch.equal(ours, pixels)
    expected = measure_samples(study.bench, pixels, study.labels)
    for name, value in study.score(pixels, study.labels).items():
        assert value == pytest.approx(expected[name], abs=2e-6), name


def test_both_arms_see_the_same_seeds(study: Study) -> None:
    """The recipe's settings are one of the arms: it must come out as the shared samples do, seed by seed."""
    assert study.config.first_element == "training-consistent"
    official, training = head_studies.first_element(study)
    assert training.metrics["FID-digits"] == pytest.approx(
        head_studies.final_layer(study)[0].metrics["FID-digits"], abs=1e-7
    )
    assert official.metrics["FID-digits"] != training.metrics["FID-digits"]
    changes = training.metrics["FID-digits"] - official.metrics["FID-digits"]
    assert training.metrics["change of FID-digits"] == pytest.approx(changes, abs=1e-6)
    again = Study(study.bench, study.num_images, study.seed).score_samples(study.config, model=study.model)
    assert again == study.base_scores == study.score_samples(study.config)
    assert study.score_samples(replace(study.config, temperature=0.5)) != study.base_scores


def test_rows_hold_means_deviations_and_paired_changes() -> None:
    first = Arm("a", "A", [{"FID-x": 1.0, "IS-x": 5.0}, {"FID-x": 3.0, "IS-x": 5.0}])
    second = Arm("b", "B", [{"FID-x": 2.0, "IS-x": 4.0}, {"FID-x": 4.0, "IS-x": 6.0}], {"images": 7.0})
    a, b = rows_of("which", first, second)
    assert (a.id, b.id, a.label) == ("discrepancies/which-a", "discrepancies/which-b", "A")
    assert a.metrics == {"FID-x": 2.0, "± FID-x": round(2**0.5, 8), "IS-x": 5.0, "± IS-x": 0.0}
    assert b.metrics["change of FID-x"] == 1.0
    assert b.metrics["± change of FID-x"] == 0.0  # the two rise together
    assert b.metrics["images"] == 7.0
    one = rows_of("which", Arm("a", "A", [{"FID-x": 1.0}]), Arm("b", "B", [{"FID-x": 4.0}]))
    assert one[1].metrics == {"FID-x": 4.0, "change of FID-x": 3.0}


def test_noise_of_seeds_is_the_measure() -> None:
    def row(arm: str, metrics: dict[str, float]) -> Row:
        return Row(id=f"discrepancies/{arm}", label=arm, metrics=metrics)

    rows = [
        row("temperature-0.96", {"FID-x": 1.6, "± FID-x": 0.1}),
        row("temperature-0.97", {"FID-x": 0.85, "± FID-x": 0.7, "change of FID-x": -0.75}),
        row("labels-balanced", {"FID-x": 1.0, "± FID-x": 0.05}),
        row("labels-random", {"FID-x": 1.2, "± FID-x": 0.05, "change of FID-x": 0.2}),
        Row(id="discrepancies/llamagen-zero-row-rotated", label="", metrics={}, not_run="no weights"),
    ]
    found = {trend.id: trend for trend in d.trends(rows, "x")}
    assert set(found) == {"noise-temperature", "noise-labels"}
    assert (found["noise-temperature"].measured, found["noise-temperature"].holds) == (1.5, True)
    assert (found["noise-labels"].measured, found["noise-labels"].holds) == (4.0, False)


# ------------------------------------------------------------------------------------------------ the head


def test_without_cache_the_head_chooses_the_same_tokens() -> None:
    head = tiny_model().head
    assert isinstance(head, ARHead)
    context = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(9, 4, generator=torch.Generator().manual_seed(1))

    def pick(logits: Tensor, place: int) -> Tensor:
        return (logits.softmax(-1).cumsum(-1) < uniforms[:, place, None]).sum(-1).clamp(max=7)

    with torch.inference_mode():
        tokens = head_studies.sample_without_cache(head, context, pick)
        assert torch.equal(tokens, head.sample(context, pick)[0])
        assert not torch.equal(tokens, head.sample(context, pick, first="training-consistent")[0])


def test_swapped_takes_the_shift_for_the_scale() -> None:
    model = tiny_model()
    other = head_studies.swapped(model)
    x, condition = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0)).unbind(0)
    final = model.head.channel_final
    scale, shift = final.adaLN_modulation(condition).chunk(2, dim=-1)
    expected = final.norm_final(x) * (1 + shift) + scale
    assert torch.allclose(other.head.channel_final(x, condition), expected, atol=1e-6)
    assert not torch.allclose(final(x, condition), expected, atol=1e-2)
    again = head_studies.swapped(other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_trained_model_breaks_when_swapped(study: Study) -> None:
    official, swapped = head_studies.final_layer(study)
    assert swapped.metrics["FID-digits"] > 3 * official.metrics["FID-digits"]
    assert swapped.metrics["class accuracy"] < 0.6 < official.metrics["class accuracy"]


# ------------------------------------------------------------------------------------------------ quantising


@pytest.mark.parametrize("num_levels", [8, 64])
def test_nearest_and_bin_differ_between_edge_and_midpoint_alone(num_levels: int) -> None:
    model = tiny_model(num_levels=num_levels)
    quantizer, edges = model.quantizer, quantizing.bin_edges(model)
    assert torch.equal(edges * 3 / 5, official_buffers(model)["boundaries"][1:-1] * torch.tensor(5 / 3) * 3 / 5)
    # A codebook value is the mean of its own bin.
    assert torch.equal(torch.bucketize(quantizer.codebook, edges), torch.arange(num_levels))
    x = torch.linspace(-6, 6, 200_001)
    differ = torch.bucketize(x, edges) != quantizer.encode(x)
    low, high = torch.minimum(edges, quantizer.midpoints), torch.maximum(edges, quantizer.midpoints)
    between = ((x[:, None] > low + 1e-5) & (x[:, None] < high - 1e-5)).any(1)
    outside = ((x[:, None] < low - 1e-5) | (x[:, None] > high + 1e-5)).all(1)
    assert differ[between].all()
    assert not differ[outside].any()
    assert between.any()


def test_share_of_a_normal_is_the_integral(study: Study) -> None:
    nearest, boundary, *_ = quantizing.encode(study)
    edges, midpoints = quantizing.bin_edges(study.model).double(), study.model.quantizer.midpoints.double()
    cdf = torch.special.ndtr
    expected = (cdf(edges) - cdf(midpoints)).abs().sum().item()
    name = "tokens that differ (N(0, 1))"
    assert boundary.metrics[name] == pytest.approx(expected, abs=5 * math.sqrt(expected / quantizing.NUM_VALUES))
    assert nearest.metrics[name] == 0 == nearest.metrics["tokens that differ"]
    assert nearest.metrics["relative MSE (N(0, 1))"] < boundary.metrics["relative MSE (N(0, 1))"]


def test_given_latents_are_measured(study: Study, tmp_path: Path) -> None:
    assert [row.not_run for row in quantizing.encode(study)[2:]] == ["no latents were given (--latents FILE)"] * 2
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "latents.npz", latents=7 * normal.numpy())  # the scale is taken out
    nearest, boundary, given_nearest, given_boundary = quantizing.encode(
        replace(study, latents=tmp_path / "latents.npz")
    )
    for given_row, row in ((given_nearest, nearest), (given_boundary, boundary)):
        assert given_row.metrics["relative MSE"] == pytest.approx(row.metrics["relative MSE (N(0, 1))"], rel=0.05)
    assert given_boundary.metrics["tokens that differ"] > 0 == given_nearest.metrics["tokens that differ"]


def test_real_latents() -> None:
    """The distortion of the official quantiser (TokenBridge at 3ede281) on the same latents."""
    path = REAL_DATA / "real_latents.npz"
    if not path.is_file():
        pytest.skip(f"real latents {path} are absent")
    latents = quantizing.read_latents(path)
    for num_levels, expected in ((16, 0.01138), (64, 0.000894)):
        quantizer = gaussian_quantizer(num_levels)
        assert quantizing._against_nearest(quantizer, quantizer.encode, latents)["relative MSE"] == pytest.approx(
            expected, rel=2e-3
        )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.ones(3)}, "cannot be read as an .npz file with an array `latents`"),
        ({"latents": np.ones(3)}, "standard deviation 0"),
        ({"latents": np.array([1.0, np.nan])}, "standard deviation nan"),
        ({"latents": np.array(["a"])}, "cannot be read as an .npz file with an array `latents`"),
    ],
)
def test_bad_latents_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "latents.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        quantizing.read_latents(tmp_path / "latents.npz")


def test_posterior_sample_flips_tokens_and_the_mean_does_not(study: Study) -> None:
    sample, mean = quantizing.posterior(study)
    assert sample.metrics["tokens that differ"] > 0 == mean.metrics["tokens that differ"]
    assert sample.metrics["± PSNR"] > 0
    assert "± PSNR" not in mean.metrics
    # The mean is what `reproduce` and `reconstruct` take.
    assert (
        mean.metrics["PSNR"]
        == quantizing.encode(study)[0].metrics["PSNR"]
        == quantizing.gaussian_fit(study)[0].metrics["PSNR"]
    )


def test_coarser_numbers_flip_more_tokens(study: Study) -> None:
    fp16, bf16 = precision.latents_precision(study)
    assert set(fp16.metrics) == set(bf16.metrics)
    assert all(0 < fp16.metrics[name] < bf16.metrics[name] for name in fp16.metrics)


# ------------------------------------------------------------------------------------------- pixels and numbers


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50))
def test_llamagen_rounds_and_cutting_loses_up_to_one(values: list[float]) -> None:
    images = torch.tensor(values)
    rounded, theirs, cut = (rule(images).int() for rule in (images_to_pixels, llamagen_pixels, truncated_pixels))
    exact = (images.double() + 1) * 127.5
    near_tie = ((exact - exact.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(theirs[~near_tie], rounded[~near_tie])
    near_whole = (exact - exact.round()).abs() < 1e-4
    assert torch.equal(cut[~near_whole], exact.floor().int()[~near_whole])
    assert ((rounded - cut) >= -1).all() and ((rounded - cut) <= 1).all()  # noqa: PT018


def test_pixels_and_numbers_of_images(study: Study) -> None:
    rounded, theirs, cut = discrepancies_sampling.pixels(study)
    assert rounded.metrics["pixels that differ"] == 0 <= theirs.metrics["pixels that differ"] < 1e-3
    assert 0.1 < cut.metrics["pixels that differ"] < 0.9
    few, many = discrepancies_sampling.num_images(study)
    assert (few.metrics["images"], many.metrics["images"]) == (10, 40)
    assert few.metrics["FID-digits"] > many.metrics["FID-digits"]


# ------------------------------------------------------------------------------------------------- baselines


def densities(seed: int, kind: type[GuidedDensity], num: int = 1) -> GuidedDensity:
    """Return a density whose proposal has an envelope, repeated: the conditional is the narrower, centres apart."""
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(2, 1, 8, generator=generator)
    scale = torch.rand(1, 8, generator=generator) + 0.2
    c = Gaussian(loc[0].expand(num, -1), scale.expand(num, -1))
    return kind(c, Gaussian(loc[1].expand(num, -1), (1.5 * scale).expand(num, -1)), 0.4)


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_the_envelope_covers_and_is_tight(seed: int) -> None:
    density = densities(seed, baselines.EnvelopedDensity)
    x = density.conditional.loc + torch.linspace(-12, 12, 20_001).view(-1, 1, 1)
    height = (density.log_prob(x).double() - density.proposal.log_prob(x).double()).exp().amax(0)
    assert torch.allclose(height, density.bound().double(), rtol=1e-3)
    official = densities(seed, GuidedDensity).bound()
    assert (official < density.bound()).all()  # never enough where the centres lie apart
    wide = baselines.EnvelopedDensity(density.unconditional, density.conditional, 4.0)
    assert wide.bound().isinf().all()  # density over proposal grows without limit


@pytest.mark.parametrize(("kind", "exact"), [(baselines.EnvelopedDensity, True), (GuidedDensity, False)])
def test_draws_are_of_the_density_under_the_envelope_alone(kind: type[GuidedDensity], exact: bool) -> None:
    num = 20_000
    c = Gaussian(torch.full((num, 2), 0.5), torch.full((num, 2), 0.7))
    density = kind(c, Gaussian(c.loc - 3 * c.scale, c.scale), 0.4)  # centres far apart
    model = givt.GIVT(**{**TINY.recipe("givt").model, "num_channels": 2})
    draw = givt_sampling.draw_guided(
        density, torch.zeros(num, 2), givt_sampling.StreamNoise(0, list(range(num)), 0, model), 1000
    )
    assert draw.first_accepted is not None
    assert (draw.first_accepted >= 0).all()
    z = baselines.EnvelopedDensity(density.conditional, density.unconditional, 0.4).standardised(draw.values).double()
    # Of 40,000 draws: the deviation of the mean is 0.005, of the deviation 0.0035.
    assert (abs(z.mean().item()) < 0.02 and abs(z.std().item() - 1) < 0.015) == exact


def test_givt_rows(study: Study) -> None:
    official, envelope = baselines.givt_guidance(study)
    assert envelope.metrics["not covered"] == 0 < official.metrics["not covered"]
    assert 0 < envelope.metrics["acceptance"] < 1
    for row in (official, envelope):
        assert 0 <= row.metrics["fallbacks"] < 1


def test_no_class_is_all_that_is_untrained() -> None:
    model = stand_in("givt")
    other = baselines.without_class_training(model, 0)
    latents, labels = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 9])
    dropped = torch.ones(2, dtype=torch.bool)
    assert torch.equal(model(latents, labels), other(latents, labels))
    assert not torch.allclose(model(latents, labels, dropped=dropped), other(latents, labels, dropped=dropped))


def test_a_turned_class_token_changes_all_but_the_first_token() -> None:
    model = stand_in("llamagen")
    other = baselines.rotated(model)
    labels = torch.tensor([1, 2])
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
    ours, theirs = model(tokens, labels), other(tokens, labels)
    # Alone, the class token attends to itself whatever its key is.
    assert torch.allclose(ours[:, 0], theirs[:, 0], atol=1e-5)
    assert ((ours[:, 1:] - theirs[:, 1:]).abs().amax(-1) > 1e-3).all()
    assert torch.equal(model.rotary_rows()[0], torch.zeros_like(model.rotary_rows()[0]))  # the copy alone is changed


# ---------------------------------------------------------------------------------------------- the command


def test_command_end_to_end(folder: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]) -> None:
    np.savez(tmp_path / "given.npz", latents=np.random.default_rng(0).normal(size=5000).astype(np.float32))
    out = tmp_path / "out"
    options = ["--weights", folder / "weights", "--data", folder / "digits", "--num-images", 20, "--out", out]
    code, stdout, stderr = run_command("discrepancies", *options, "--latents", tmp_path / "given.npz")
    assert code == 0, stderr
    results = read(out / "results.json")
    page = (out / "tables.md").read_text()
    assert [row.not_run for row in results.rows] == [None] * len(results.rows)
    for row in results.rows:
        assert row.label in page
        assert row.metrics
        assert all(metric(name) in METRICS.values() for name in row.metrics)
    sections = d.by_comparison(results)
    assert all(len(rows) >= 2 for rows in sections.values())
    assert [row for rows in sections.values() for row in rows] == results.rows
    assert {"noise-temperature", "noise-first-element", "noise-llamagen-zero-row"} <= {t.id for t in results.trends}
    assert "given latents (given.npz)" in results.provenance.data_sha256
    assert "givt/config.json" in results.provenance.weights_sha256
    assert "Temperature of TokenBridge-L" in stdout
    assert json.loads((out / "results.json").read_text())["scale"] == "tiny"


def test_rows_without_weights_or_latents_are_not_run(folder: Path, study: Study, tmp_path: Path) -> None:
    shutil.copytree(folder / "weights" / "tokenbridge-64", tmp_path / "tokenbridge-64")
    without = replace(study, bench=replace(study.bench, weights=tmp_path))
    rows = baselines.givt_guidance(without) + baselines.givt_no_class(without) + baselines.llamagen_zero_row(without)
    assert [row.id.removeprefix("discrepancies/") for row in rows] == [
        "givt-guidance-rejection-official",
        "givt-guidance-rejection-envelope",
        "givt-no-class-trained",
        "givt-no-class-untrained",
        "llamagen-zero-row-official",
        "llamagen-zero-row-rotated",
    ]
    assert all(row.not_run is not None and "there are no weights of" in row.not_run for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-images", "30"], "multiple of twice the 10 classes"),
        (["--num-images", "0"], "multiple of twice"),
        (["--latents", "missing.npz"], "missing.npz"),
        (["--weights", "missing"], "No model of the scale tiny is in missing. `tokenbridge train tiny` makes them in"),
    ],
)
def test_refusals(options: list[str], message: str, run_command: Callable[..., tuple[int, str, str]]) -> None:
    assert message in error_of(run_command("discrepancies", *options))


# ------------------------------------------------------------------------------------------- the shipped results


def test_the_shipped_page_is_that_of_the_shipped_results() -> None:
    results = read(RESULTS / "results.json")
    assert (RESULTS / "tables.md").read_text() == d.to_markdown(results) + "\n"
    assert results.provenance.dirty is False
    assert all(rows for rows in d.by_comparison(results).values())
    for name, sha256 in results.provenance.weights_sha256.items():
        assert sha256_of(SHIPPED / name) == sha256


def test_stored_effects_that_must_not_change_sides() -> None:
    """What the measured rows are cited for; each bound lies far from the stored value."""
    rows = {row.id.removeprefix("discrepancies/"): row.metrics for row in read(RESULTS / "results.json").rows}
    assert rows["final-layer-swapped"]["FID-digits"] > 10 * rows["final-layer-official"]["FID-digits"]
    assert rows["head-cache-cached"]["tokens that differ"] < 0.001
    assert rows["head-cache-cached"]["speed-up"] > 1.5
    assert 0.003 < rows["encode-boundary"]["tokens that differ (N(0, 1))"] < 0.007
    assert rows["num-images-500"]["FID-digits"] > 1.2 * rows["num-images-2000"]["FID-digits"]
    assert (
        rows["latents-bf16"]["tokens that differ (latents)"] > 4 * rows["latents-fp16"]["tokens that differ (latents)"]
    )
