"""MAR: goldens and their mutations, generation, loss, presets, published names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from diffusers import AutoencoderKL
from golden_cases import listed_goldens
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from official_names import from_official, layout, load_official, rule_state, to_official
from published import published_numbers, published_shapes
from samplers import sample_images
from torch import Tensor

from tokenbridge.conformance import mar as golden_mar
from tokenbridge.conformance.judge import ENTRIES, Outcome, run_file
from tokenbridge.models.layers import take
from tokenbridge.models.mar import diffusion
from tokenbridge.models.mar import model as mar
from tokenbridge.models.mar import sampling as mar_sampling
from tokenbridge.models.mar.checkpoint import load_mar, mar_layout
from tokenbridge.models.mar.model import MAR, guide, mar_loss
from tokenbridge.models.mar.presets import PRESETS, create_mar
from tokenbridge.models.mar.sampling import (
    GenerationStep,
    LatentNoise,
    MarSampling,
    generate_latents,
    generation,
    latent_noise,
)
from tokenbridge.models.masked import MaskedBackbone
from tokenbridge.models.masked_sampling import masked_counts
from tokenbridge.tokenizers.base import LatentTokenizer
from tokenbridge.utils.files import sha256_of
from tokenbridge.weights.diffusers import load_model, save_model
from tokenbridge.weights.published import build_preset

CASES = sorted(GOLDENS.glob("mar-*.npz"))
TINY: dict[str, Any] = {
    "latent_size": 4,
    "num_channels": 3,
    "num_classes": 5,
    "width": 24,
    "encoder_depth": 1,
    "decoder_depth": 2,
    "num_heads": 2,
    "num_buffer": 2,
    "head_width": 16,
    "head_depth": 2,
}
B, L, C = 4, 16, 3
LABELS = torch.tensor([0, 3, 4, 1])
PLAIN = MarSampling(num_iterations=5, num_diffusion_steps=8)
GUIDED = replace(PLAIN, guidance_scale=2.5)


def tiny_mar(**changes: Any) -> MAR:
    """Return a model in which every parameter matters: at initialisation the head predicts nothing."""
    with torch.device("meta"):
        model = MAR(**{**TINY, **changes}).eval()
    load_official(model, rule_state(model, {"rule": "fan-in-normal-v1", "salt": "tiny"}))
    return model


MODEL = tiny_mar()


def noise(seed: int = 0, indices: list[int] | None = None) -> LatentNoise:
    return latent_noise(seed, list(range(B)) if indices is None else indices, L, C)


def generate(config: MarSampling, *, seed: int = 0, labels: Tensor | None = LABELS) -> Tensor:
    return generate_latents(MODEL, labels, config, noise(seed))


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to rounding; an untrained head's latents grow to about 1e4, 1 / signal of the first step."""
    return torch.allclose(ours, theirs, rtol=1e-4, atol=0.1)


# ----------------------------------------------------------------------------------------------------- goldens


def failed(outcomes: list[Outcome]) -> set[str]:
    return {outcome.name for outcome in outcomes if outcome.verdict == "fail"}


def changed(path: Path, folder: Path, change: Callable[[dict[str, Any], dict[str, NDArray[Any]]], Any]) -> Path:
    """Write a copy of a golden file after `change(meta, arrays)`."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    change(meta, arrays)
    np.savez(folder / "changed.npz", meta=np.array(json.dumps(meta)), **arrays)
    return folder / "changed.npz"


def test_all_public_cases_are_here() -> None:
    assert len(CASES) == 12
    assert {json.loads(str(np.load(path)["meta"]))["entry"] for path in CASES} == set(ENTRIES["mar"])
    assert {path.name: sha256_of(path) for path in CASES} == listed_goldens("mar-")


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    outcomes = run_file(path)
    assert [outcome for outcome in outcomes if outcome.verdict != "pass"] == []
    with np.load(path) as file:
        outputs = {key[4:]: file[key] for key in file.files if key.startswith("out.")}
    assert {outcome.name for outcome in outcomes} == outputs.keys()
    for outcome in outcomes:
        # The features of the chaotic cases are sharp, and so is everything that no first step has multiplied.
        chaotic = outcome.name.startswith(("sample", "trajectory", "latents", "tokens")) and "-sample" in path.stem
        largest = float(np.abs(outputs[outcome.name]).max())
        assert outcome.error is not None
        assert outcome.error <= (1e-3 if chaotic else 2e-6) * max(1.0, largest) + 1e-5, outcome


@pytest.mark.parametrize(
    ("path", "output"),
    [
        (path, key[4:])
        for path in CASES
        for key in np.load(path).files
        if key.startswith("out.") and not key.endswith(("_1", "_2", "_3", "_4"))
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_a_changed_value_fails_its_output_alone(path: Path, output: str, tmp_path: Path) -> None:
    def change(meta: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        array = arrays[f"out.{output}"]
        flat = array.reshape(-1)
        tolerance = meta["tolerance"]["atol"] + meta["tolerance"]["rtol"] * np.abs(flat[-1:])
        flat[-1:] += 1 if np.issubdtype(array.dtype, np.integer) else 2 * tolerance

    assert failed(run_file(changed(path, tmp_path, change))) == {output}


def _swap(first: str, second: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Exchange two official tensors of one shape."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original = mar_layout

        def swapped(model: MAR) -> Any:
            layout = original(model)
            mappings = dict(layout.mappings)
            mappings[first], mappings[second] = mappings[second], mappings[first]
            return replace(layout, mappings=mappings)

        patch.setattr("tokenbridge.conformance.mar.mar_layout", swapped)

    return apply


def _patch(owner: Any, name: str, wrong: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Replace a function by `wrong(function)`."""
    return lambda patch: patch.setattr(owner, name, wrong(getattr(owner, name)))


Swapped = Callable[..., Any]


def _initial_noise_scaled(sample: Swapped) -> Swapped:
    def wrong(self: Any, process: Any, context: Tensor, noise: Tensor, **options: Any) -> Any:
        scaled = torch.cat([noise[:1] * options["temperature"], noise[1:]])
        return sample(self, process, context, scaled, **options)

    return wrong


def _other_rates(_: Swapped) -> Swapped:
    def wrong(timesteps: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10_000.0) * torch.arange(128, dtype=torch.float32) / 127)  # 127 for 128
        angles = timesteps[..., None].float() * rates
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    return wrong


def _no_temperature(sample: Swapped) -> Swapped:
    return lambda *given, **options: sample(*given, **{**options, "temperature": 1.0})


def _visible_labels(_: Swapped) -> Swapped:
    return lambda self, labels, dropped=None: self.class_emb(labels)


MUTATIONS: list[tuple[str, Callable[[pytest.MonkeyPatch], None], str, set[str]]] = [
    (
        "two norms of the decoder change places",
        _swap("decoder_blocks.0.norm1.weight", "decoder_blocks.0.norm2.weight"),
        "mar-features",
        {"z"},
    ),
    (
        "two norms of the encoder change places",
        _swap("encoder_blocks.0.norm1.bias", "encoder_blocks.1.norm1.bias"),
        "mar-features-asym",
        {"encoder", "z"},
    ),
    (
        "two layers of the head change places",
        _swap("diffloss.net.res_blocks.0.mlp.0.weight", "diffloss.net.res_blocks.0.mlp.2.weight"),
        "mar-diffusion-loss-net",
        {"out", "out_cfg"},
    ),
    (
        "another timestep embedding",
        _patch(mar, "sinusoid", _other_rates),
        "mar-diffusion-loss-net",
        {"t_embed", "out", "out_cfg"},
    ),
    (
        "the temperature has no effect",
        _patch(mar.DiffusionHead, "sample", _no_temperature),
        "mar-diffusion-sample-stable-cfg",
        {"sample", "trajectory"},
    ),
    (
        "the temperature scales the initial noise",
        _patch(mar.DiffusionHead, "sample", _initial_noise_scaled),
        "mar-diffusion-sample-stable",
        {"sample", "trajectory"},
    ),
    (
        "the temperature scales the initial noise",
        _patch(mar.DiffusionHead, "sample", _initial_noise_scaled),
        "mar-diffusion-sample",
        {"sample", "trajectory"},
    ),
    (
        "the temperature scales the initial noise",
        _patch(mar.DiffusionHead, "sample", _initial_noise_scaled),
        "mar-diffusion-sample-cfg",
        {"sample", "trajectory"},
    ),
    (
        "betas are not cut",
        lambda patch: patch.setattr(diffusion, "MAX_BETA", 0.9995),
        "mar-diffusion-training-loss",
        {"loss", "vb", "masked_mean_loss"},
    ),
    (
        "other levels at t = 0",
        lambda patch: patch.setattr(diffusion, "PIXEL", 1 / 127),
        "mar-diffusion-training-loss",
        {"loss", "vb"},
    ),
    (
        "diffusers' spacing",
        _patch(diffusion, "spaced_timesteps", lambda _: lambda spacing: list(range(0, 1000, 1000 // int(spacing)))),
        "mar-diffusion-step",
        {"mean", "log_variance", "pred_xstart", "sample", "timestep_map"},
    ),
    (
        "the temperature scales the initial noise",
        _patch(mar.DiffusionHead, "sample", _initial_noise_scaled),
        "mar-sample-nocfg",
        {"latents", "tokens_0", "tokens_4"},
    ),
    (
        "the schedule of guidance is constant",
        _patch(mar_sampling, "iterations", lambda f: lambda c, n: f(replace(c, guidance_schedule="constant"), n)),
        "mar-sample",
        {"latents", "tokens_0", "tokens_5"},
    ),
    (
        "no label is dropped",
        _patch(MaskedBackbone, "embed_class", _visible_labels),
        "mar-forward-loss",
        {"loss"},
    ),
]


def test_every_golden_has_a_mutation() -> None:
    assert {case for _, _, case, _ in MUTATIONS} == {path.stem for path in CASES}


@pytest.mark.parametrize(("what", "mutate", "case", "outputs"), MUTATIONS, ids=[f"{m[2]}: {m[0]}" for m in MUTATIONS])
def test_mutations_are_noticed(
    what: str,
    mutate: Callable[[pytest.MonkeyPatch], None],
    case: str,
    outputs: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mutate(monkeypatch)
    assert outputs <= failed(run_file(GOLDENS / f"{case}.npz"))


@pytest.mark.parametrize("case", ["mar-sample", "mar-features", "mar-diffusion-step"])
def test_the_salt_decides(case: str, tmp_path: Path) -> None:
    """The control of the weights: another salt, other numbers."""
    path = changed(GOLDENS / f"{case}.npz", tmp_path, lambda meta, arrays: meta["weights"].update(salt="other"))
    assert failed(run_file(path)) & {"latents", "z", "mean"}


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        ("mar-features", lambda meta, arrays: meta["config"].update(depth=3), "Unknown configuration keys: depth"),
        ("mar-features", lambda meta, arrays: meta["config"].update(preset="mar-xxl"), "Unknown preset 'mar-xxl'"),
        ("mar-features", lambda meta, arrays: meta["config"].update(img_size=128), r"in\.latents has the shape"),
        ("mar-forward-loss", lambda meta, arrays: meta["config"].pop("proj_dropout"), "Dropout draws"),
        ("mar-sample", lambda meta, arrays: arrays.pop("in.step_noise_3"), "step_noise_3"),
        ("mar-sample", lambda meta, arrays: meta["config"].update(num_sampling_steps="20"), "has 25 steps"),
        ("mar-sample", lambda meta, arrays: meta["arguments"].update(cfg_schedule="cosine"), "Unknown guidance"),
        ("mar-sample", lambda meta, arrays: arrays["in.orders"].__setitem__((0, 0), 0), "not permutations"),
        ("mar-sample", lambda meta, arrays: arrays.update({"in.noise_1": np.zeros(1)}), r"Unknown arrays: in\.noise_1"),
        ("mar-diffusion-sample", lambda meta, arrays: arrays.pop("in.z"), r"missing: in\.z"),
    ],
)
def test_what_cannot_be_run_is_a_failure_with_its_reason(
    case: str, change: Callable[[dict[str, Any], dict[str, NDArray[Any]]], Any], reason: str, tmp_path: Path
) -> None:
    (outcome,) = run_file(changed(GOLDENS / f"{case}.npz", tmp_path, change))
    assert (outcome.name, outcome.verdict) == ("file", "fail")
    assert re.search(reason, outcome.reason)


def test_labels_may_be_absent(tmp_path: Path) -> None:
    """sample_tokens without labels uses "no class" for all; both halves of guidance are then the same."""
    path = changed(GOLDENS / "mar-sample.npz", tmp_path, lambda meta, arrays: arrays.pop("in.labels"))
    outcomes = run_file(path)
    assert "latents" in failed(outcomes)  # the numbers are those with labels
    assert not any(outcome.reason.startswith("shape") for outcome in outcomes)


def test_a_preset_is_completed_by_the_constructors_defaults() -> None:
    config = golden_mar.mar_config({"preset": "mar_huge", "class_num": 10})
    assert (config["encoder_embed_dim"], config["decoder_depth"], config["norm_layer_eps"]) == (1280, 20, 1e-6)
    assert (config["diffloss_d"], config["diffloss_w"]) == (3, 1024)  # the caller chooses the head; these are defaults
    assert golden_mar.mar_config({})["norm_layer_eps"] == 1e-5
    full = golden_mar.mar_config({"preset": "mar_base", "diffloss_d": 6})
    assert sum(p.numel() for p in golden_mar.make_mar(full).parameters()) == 207_924_768


# -------------------------------------------------------------------------------------------------- generation


def steps_of(config: MarSampling, labels: Tensor | None = LABELS) -> list[GenerationStep]:
    return list(generation(MODEL, labels, config, noise()))


@pytest.mark.parametrize("num_iterations", [1, 5, L])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_every_position_is_filled_exactly_once(num_iterations: int, guidance_scale: float) -> None:
    steps = steps_of(replace(PLAIN, num_iterations=num_iterations, guidance_scale=guidance_scale))
    assert len(steps) == num_iterations
    before = torch.zeros(B, L, C)
    for step, still_masked in zip(steps, masked_counts(L, num_iterations), strict=True):
        assert step.positions.shape[1] == step.iteration.num_masked - still_masked
        assert (step.positions.diff(dim=1) > 0).all()
        assert (take(before, step.positions) == 0).all()
        assert torch.equal(take(step.sequence, step.positions), step.predicted)
        others = torch.ones(B, L, dtype=torch.bool).scatter(1, step.positions, False)
        assert torch.equal(step.sequence[others], before[others])
        before = step.sequence
    assert (before != 0).all()


def test_an_order_is_consumed_from_its_end() -> None:
    orders = noise().orders
    first = steps_of(PLAIN)[0]
    assert torch.equal(first.positions, orders[:, first.iteration.still_masked :].sort(dim=1).values)


def test_a_seed_gives_an_image() -> None:
    assert torch.equal(generate(GUIDED), generate(GUIDED))
    assert not close(generate(GUIDED), generate(GUIDED, seed=1))
    assert not close(generate(GUIDED), generate(GUIDED, labels=(LABELS + 1) % 5))
    assert not close(generate(GUIDED), generate(PLAIN))


@pytest.mark.parametrize("config", [PLAIN, GUIDED])
def test_an_image_does_not_depend_on_its_batch(config: MarSampling) -> None:
    together = generate(config)
    for index in range(B):
        alone = generate_latents(MODEL, LABELS[index : index + 1], config, noise(indices=[index]))
        assert close(alone[0], together[index])
    swapped = generate_latents(MODEL, LABELS[[2, 0]], config, noise(indices=[2, 0]))
    assert close(swapped, together[[2, 0]])


def test_noise_is_each_images_own_and_drawn_in_turn() -> None:
    both, alone = latent_noise(3, [5, 9], L, C), latent_noise(3, [9], L, C)
    assert torch.equal(both.orders[1], alone.orders[0])
    for num_drawn in (1, 4):
        ours, theirs = both.draw(num_drawn, 6), alone.draw(num_drawn, 6)
        assert ours.shape == (7, 2, num_drawn, C)
        assert torch.equal(ours[:, 1], theirs[:, 0])
        assert not torch.equal(ours[:, 0], ours[:, 1])
    with pytest.raises(ValueError, match="seed must be at least 0"):
        latent_noise(-1, [0], L, C)


def test_temperature_0_has_no_noise_but_the_initial_one() -> None:
    cold, orders = replace(PLAIN, temperature=0.0), noise().orders

    def with_steps(factor: float) -> LatentNoise:
        drawn = noise()

        def draw(num_drawn: int, num_steps: int) -> Tensor:
            values = drawn.draw(num_drawn, num_steps)
            return torch.cat([values[:1], factor * values[1:]])

        return LatentNoise(orders, draw)

    as_drawn, without = (generate_latents(MODEL, LABELS, cold, with_steps(factor)) for factor in (1.0, 0.0))
    assert torch.equal(as_drawn, without)
    warm, warm_without = (generate_latents(MODEL, LABELS, PLAIN, with_steps(factor)) for factor in (1.0, 0.0))
    assert not torch.equal(warm, warm_without)
    assert torch.equal(warm_without, without)


@given(st.floats(0, 5))
def test_guidance_mixes_noise_and_leaves_the_variance(guidance: float) -> None:
    output = torch.randn(6, 2 * C, generator=torch.Generator().manual_seed(0))
    mixed = guide(output, guidance)
    assert torch.equal(mixed[:, C:], output[:3, C:])
    expected = output[3:, :C] + guidance * (output[:3, :C] - output[3:, :C])
    torch.testing.assert_close(mixed[:, :C], expected)
    assert torch.allclose(guide(output, 1.0), output[:3], atol=1e-6)
    assert torch.equal(guide(output, 0.0)[:, :C], output[3:, :C])


def test_guidance_of_equal_halves_changes_nothing() -> None:
    assert close(generate(GUIDED, labels=None), generate(PLAIN, labels=None))


def test_the_doubled_batch_equals_two_passes() -> None:
    step = steps_of(GUIDED)[2]
    sequence = steps_of(GUIDED)[1].sequence
    visible = noise().orders[:, step.iteration.num_masked :].sort(dim=1).values
    with torch.inference_mode():
        conditional = MODEL.context(sequence, visible, LABELS, positions=step.positions)
        unconditional = MODEL.context(sequence, visible, None, positions=step.positions)
    torch.testing.assert_close(step.context, torch.cat([conditional, unconditional]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("labels", "config", "message"),
    [
        ([0, 1, 2], PLAIN, "one label for each of 4"),
        ([0, 1, 2, 5], PLAIN, "classes 0 to 4"),
        ([0, 1, 2, 3], replace(PLAIN, num_iterations=17), r"in \[1, 16\]"),
    ],
)
def test_what_cannot_be_generated(labels: list[int], config: MarSampling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_latents(MODEL, torch.tensor(labels), config, noise())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_iterations": 0}, "at least 1"),
        ({"guidance_scale": math.nan}, "guidance scale"),
        ({"temperature": -1.0}, "temperature"),
        ({"num_diffusion_steps": 2000}, "diffusion steps"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **change)


def test_pixels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(latent_channels=C, block_out_channels=(32,), sample_size=4)
    tokenizer = LatentTokenizer(autoencoder)
    labels = torch.tensor([0, 1, 2, 3, 4])
    images = sample_images("mar", MODEL, tokenizer, PLAIN, labels, 0, batch_size=2)
    assert images.shape == (5, 3, 4, 4)
    assert images.dtype == torch.uint8
    others = sample_images("mar", MODEL, tokenizer, PLAIN, labels, 0, batch_size=5)
    assert (images.int() - others.int()).abs().max() <= 1  # rounding to 8 bits
    with pytest.raises(ValueError, match="at least 1"):
        sample_images("mar", MODEL, tokenizer, PLAIN, labels[:0], 0)


# ------------------------------------------------------------------------------------------------ model and loss


@given(st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(1, 3))
def test_patches_and_back(patch_size: int, side: int, channels: int) -> None:
    size = patch_size * side
    with torch.device("meta"):
        model = MAR(**{**TINY, "latent_size": size, "num_channels": channels, "patch_size": patch_size})
    latents = torch.arange(2 * channels * size**2).float().view(2, channels, size, size)
    sequence = model.to_sequence(latents)
    assert sequence.shape == (2, side**2, model.num_channels)
    assert torch.equal(sequence[0, 0].view(channels, patch_size, patch_size), latents[0, :, :patch_size, :patch_size])
    assert torch.equal(model.to_latents(sequence), latents)


def test_patches_must_divide() -> None:
    with pytest.raises(ValueError, match="whole number of patches"):
        MAR(**{**TINY, "patch_size": 3})


def test_a_new_head_predicts_nothing() -> None:
    """As the official initialisation: blocks do nothing, the output is 0, so the error is the noise's variance."""
    torch.manual_seed(0)
    model = MAR(**TINY).eval()
    latents = torch.randn(32, C, 4, 4)
    with torch.no_grad():
        assert (model.head(torch.randn(5, C), torch.arange(5), torch.randn(5, TINY["width"])) == 0).all()
    t = torch.randint(1, 900, (4, 32, 8))
    everywhere = torch.arange(L).expand(32, -1)
    noise_values = torch.randn(*t.shape, C)
    losses = model(
        model.to_sequence(latents),
        torch.zeros(32, dtype=torch.int64),
        everywhere[:, 8:],
        everywhere[:, :8],
        t,
        noise_values,
    )
    squared = noise_values.square().mean(-1)
    assert (losses >= squared).all()  # what is left is a divergence


def test_the_loss_of_masked_positions_is_the_masked_mean_of_all() -> None:
    """The official code's way: the loss of every position, then the mean over masked ones."""
    torch.manual_seed(0)
    latents = torch.randn(B, C, 4, 4)
    sequence = MODEL.to_sequence(latents)
    order = torch.stack([torch.randperm(L) for _ in range(B)])
    visible, masked = order[:, 11:].sort(dim=1).values, order[:, :11]
    t, noise_values = torch.randint(1000, (2, B, L)), torch.randn(2, B, L, C)
    everywhere = torch.arange(L).expand(B, -1)
    dropped = torch.tensor([False, True, False, False])
    with torch.no_grad():
        all_losses = MODEL(sequence, LABELS, visible, everywhere, t, noise_values, dropped=dropped)
        mask = torch.zeros(B, L).scatter(1, masked, 1.0)
        theirs = (all_losses * mask).sum() / mask.sum() / 2
        t_masked = torch.stack([take(each, masked) for each in t])
        noise_masked = torch.stack([take(each, masked) for each in noise_values])
        ours = MODEL(sequence, LABELS, visible, masked, t_masked, noise_masked, dropped=dropped)
    assert ours.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    assert all_losses.mean().item() != pytest.approx(theirs.item(), rel=1e-3)


def test_masked_latents_are_not_seen() -> None:
    sequence = torch.randn(B, L, C)
    order = noise().orders
    visible, masked = order[:, 10:].sort(dim=1).values, order[:, :10]
    hidden = sequence.scatter(1, masked[..., None].expand(-1, -1, C), 99.0)
    with torch.no_grad():
        assert torch.equal(MODEL.context(sequence, visible, LABELS), MODEL.context(hidden, visible, LABELS))


def test_the_loss_falls_to_what_the_data_leave() -> None:
    """Two classes of constant latents are no secret: in a few steps the model beats one that knows no class."""
    torch.manual_seed(0)
    model = MAR(**{**TINY, "latent_size": 2, "num_channels": 2, "dropout": 0.0})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    labels = torch.arange(64) % 2
    latents = (2.0 * labels - 1).view(64, 1, 1, 1).expand(64, 2, 2, 2)
    losses = []
    for _ in range(150):
        loss = mar_loss(model, latents, labels, label_dropout=0.0, mask_ratio_min=0.99)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    start, end = np.median(losses[:10]), np.median(losses[-30:])
    assert end < 0.4 * start
    assert all(p.grad is not None for name, p in model.named_parameters() if "fake_latent" not in name)


def test_loss_options() -> None:
    latents, labels = torch.randn(B, C, 4, 4), LABELS
    torch.manual_seed(0)
    few = mar_loss(MODEL, latents, labels, num_loss_positions=2, num_noises=1, mask_ratio_min=0.0, mask_ratio_std=1.0)
    assert few.ndim == 0
    torch.manual_seed(0)
    again = mar_loss(MODEL, latents, labels, num_loss_positions=2, num_noises=1, mask_ratio_min=0.0, mask_ratio_std=1.0)
    assert torch.equal(few, again)
    torch.manual_seed(0)
    assert not torch.equal(few, mar_loss(MODEL, latents, labels))


def test_save_and_load(tmp_path: Path) -> None:
    model = tiny_mar()
    save_model(model, tmp_path / "mar")
    again = load_model(MAR, tmp_path / "mar", TINY)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# ------------------------------------------------------------------------------------------ presets and names


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_counts(name: str) -> None:
    model, published = create_mar(name), published_numbers()["counted"][PRESETS[name].official_name]
    assert model.device.type == "meta"
    assert PRESETS[name].num_parameters == published["total"] == sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in model.head.parameters()) == published["head"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_names_and_shapes(name: str) -> None:
    published = published_shapes(PRESETS[name].official_name)
    assert {key: mapping.shape for key, mapping in layout(create_mar(name)).mappings.items()} == published


def test_published_settings() -> None:
    settings = {name: preset.sampling_config() for name, preset in PRESETS.items()}
    assert [settings[name].guidance_scale for name in ("mar-b", "mar-l", "mar-h")] == [2.9, 3.0, 3.2]
    for config in settings.values():
        assert (config.num_iterations, config.num_diffusion_steps, config.temperature) == (256, 100, 1.0)
        assert config.guidance_schedule == "linear"
    plain = PRESETS["mar-l"].sampling_config("unguided")
    assert (plain.guidance_scale, plain.temperature) == (1.0, 0.95)
    assert create_mar("mar_base").config["width"] == 768  # official names work too
    with pytest.raises(ValueError, match=r"Unknown preset 'mar'; there are mar-b, mar-l, mar-h"):
        create_mar("mar")


def test_a_wrong_parameter_count_is_noticed() -> None:
    with pytest.raises(AssertionError, match="not the expected 1"):
        build_preset(MAR, replace(PRESETS["mar-b"], num_parameters=1))


def test_names_there_and_back() -> None:
    state = to_official(MODEL)
    assert "diffusion_pos_embed_learned" in state
    assert "diffloss.net.res_blocks.1.adaLN_modulation.1.weight" in state
    with torch.device("meta"):
        again = MAR(**TINY).eval()
    load_official(again, state)
    ours, theirs = MODEL.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    back = to_official(again)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_strictness() -> None:
    state = dict(to_official(MODEL))
    with pytest.raises(ValueError, match=r"1 missing: mask_token"):
        from_official(MODEL, {name: value for name, value in state.items() if name != "mask_token"})
    with pytest.raises(ValueError, match=r"1 left over: output_pos_embed"):  # TokenBridge's name for it
        from_official(MODEL, {**state, "output_pos_embed": state["diffusion_pos_embed_learned"]})
    with pytest.raises(ValueError, match=r"1 of another shape: fake_latent \[2, 24\] instead of \[1, 24\]"):
        from_official(MODEL, {**state, "fake_latent": torch.zeros(2, 24)})
    with pytest.raises(ValueError, match=r"not the state of MAR"):
        from_official(MODEL, {})


def test_the_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        PRESETS,
        "mar-b",
        replace(PRESETS["mar-b"], model=TINY, num_parameters=sum(p.numel() for p in MODEL.parameters())),
    )
    state = to_official(MODEL)
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    content = {"model": other, "model_ema": state, "optimizer": {}, "epoch": 800}
    torch.save(content, tmp_path / "checkpoint-last.pth")
    model = load_mar(tmp_path, "mar-b")  # the average of the weights, from the folder
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), MODEL.parameters(), strict=True))
    assert not model.training
    plain = load_mar(tmp_path / "checkpoint-last.pth", "mar_base", ema=False)
    assert all((p == 0).all() for p in plain.parameters())
    torch.save({"model_ema": {**state, "more": torch.zeros(1)}}, tmp_path / "checkpoint-last.pth")
    with pytest.raises(ValueError, match=r"checkpoint-last\.pth: This is not .* left over: more"):
        load_mar(tmp_path, "mar-b")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_mar(tmp_path / "absent.pth", "mar-b")
