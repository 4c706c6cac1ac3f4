"""GIVT: its mixtures, transformer, DB-CFG, sampling, and its golden cases."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_cases import Arrays, changed, failed, golden, listed_goldens, only_failure, set_meta
from hypothesis import given
from hypothesis import strategies as st
from official_names import load_official, rule_state
from samplers import sample_images
from torch import Tensor

from tokenbridge.conformance import givt as gg
from tokenbridge.conformance import judge as c
from tokenbridge.conformance.golden import complete
from tokenbridge.models.givt import model as g
from tokenbridge.models.givt.density import Gaussian, GuidedDensity, Mixture
from tokenbridge.models.givt.model import GIVT, givt_loss
from tokenbridge.models.givt.sampling import (
    Draw,
    GivtSampling,
    StreamNoise,
    draw_guided,
    draw_token,
    generate_latents,
)
from tokenbridge.tokenizers.base import LatentTokenizer
from tokenbridge.tokenizers.givt_vae import GivtVAE
from tokenbridge.utils.files import reference_folder, sha256_of
from tokenbridge.weights.rule import draw_rule

TINY: dict[str, Any] = {
    "num_positions": 9,
    "num_channels": 3,
    "num_classes": 5,
    "num_components": 4,
    "width": 32,
    "depth": 2,
    "num_heads": 4,
    "mlp_width": 48,
}
L, C, M = 9, 3, 4
RULE = {"rule": "fan-in-normal-v1", "salt": "tiny"}
GUIDED = GivtSampling(temperature=0.9, guidance_weight=0.4)


def tiny_givt(**changes: Any) -> GIVT:
    """Return a model of 9 positions in evaluation mode; at initialisation its head is zero, and all is alike."""
    model = GIVT(**{**TINY, **changes}).eval()
    load_official(model, rule_state(model, RULE))
    return model


MODEL = tiny_givt()
LABELS = torch.tensor([0, 4, 2])


def stream(position: int, indices: list[int] | None = None, *, seed: int = 0, model: GIVT = MODEL) -> StreamNoise:
    return StreamNoise(seed, [0, 1, 2] if indices is None else indices, position, model)


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# ---------------------------------------------------------------------------------------------------- golden

CASES = sorted((reference_folder() / "goldens").glob("givt-*.npz"))


def test_all_public_cases_are_here() -> None:
    assert len(CASES) == 7
    assert {path.name: sha256_of(path) for path in CASES} == listed_goldens("givt-")


@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_golden(path: Path) -> None:
    outcomes = c.run_file(path)
    assert [outcome for outcome in outcomes if outcome.verdict != "pass"] == []
    with np.load(path) as file:
        expected = {key[4:]: file[key] for key in file.files if key.startswith("out.")}
    assert {outcome.name for outcome in outcomes} == set(expected)
    for outcome in outcomes:
        # Far inside the case's tolerance: float32 sums in another order. The constants of DB-CFG reach 1e6.
        values = expected[outcome.name].astype(np.float64)
        largest = np.abs(values[np.isfinite(values)]).max()
        assert outcome.error is not None
        assert outcome.error < 8e-5 * max(1, largest)


@pytest.mark.parametrize(
    ("name", "output"),
    [(path.stem, key[4:]) for path in CASES for key in np.load(path).files if key.startswith("out.")],
)
def test_a_changed_value_fails_its_output_alone(
    name: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(meta: dict[str, Any], arrays: Arrays) -> None:
        array = arrays[f"out.{output}"].copy()
        place = tuple(np.argwhere(np.isfinite(array))[0])
        if array.dtype == bool:
            array[place] = ~array[place]
        else:
            array[place] += 1 if np.issubdtype(array.dtype, np.integer) else 0.01 + 0.01 * abs(array[place])
        arrays[f"out.{output}"] = array

    assert failed(c.run_file(changed(name, tmp_path, change))) == {output}


LOGITS = {"logits", "mixture_logprobs", "mixture_probs", "locs", "scales", "nll", "nll_sum", "nll_mean"}


@pytest.mark.parametrize(
    ("name", "change", "outputs"),
    [
        ("givt-causal-logits", set_meta("weights", "salt", to="other"), LOGITS),
        (
            "givt-causal-logits",
            set_meta("config", "fix_square_plus", to=False),
            {"scales", "nll", "nll_sum", "nll_mean"},
        ),
        ("givt-causal-logits", set_meta("config", "scale_tol", to=0.9), {"scales", "nll", "nll_sum", "nll_mean"}),
        ("givt-causal-logits", set_meta("config", "num_heads", to=4), LOGITS),  # other arrays, and other names' numbers
        ("givt-causal-logits", set_meta("config", "scan", to=True), LOGITS),  # scanned arrays are drawn as one
        ("givt-decode", set_meta("arguments", "temp", to=1.0), {"sequences"}),
        ("givt-decode", set_meta("arguments", "temp_probs", to=3.0), {"sequences"}),
        ("givt-decode-cfg", set_meta("arguments", "cfg_inference_weight", to=0.5), {"fac"}),
        ("givt-cfg-density", set_meta("config", "cfg_inference_weight", to=0.5), {"cfg_fac", "cfg_log_prob"}),
        (
            "givt-cfg-density",
            set_meta("config", "max_samples", to=2),
            {"cfg_sample", "cfg_accepted", "cfg_first_accept"},
        ),
        ("givt-sample-step", set_meta("arguments", "temp", to=0.9), {"cond_scales", "uncond_scales", "plain_sample"}),
    ],
)
def test_other_settings_are_noticed(name: str, change: Any, outputs: set[str], tmp_path: Path) -> None:
    assert outputs <= failed(c.run_file(changed(name, tmp_path, change)))


def test_dropped_labels_are_noticed(tmp_path: Path) -> None:
    def change(meta: dict[str, Any], arrays: Arrays) -> None:
        arrays["in.drop_labels_mixed"] = ~arrays["in.drop_labels_mixed"]

    assert failed(c.run_file(changed("givt-causal-nolabel", tmp_path, change))) == {"logits_mixed"}


def other_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate="none": exact(x))


def other_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(g, "NORM_EPS", 1e-3)


def other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take queries for keys: shapes cannot tell them apart."""
    original = draw_rule

    def swapped(*arguments: Any) -> dict[str, Tensor]:
        state = original(*arguments)
        first, second = (f"decoder/EncDecBlock1/SelfAttn/{name}/kernel" for name in ("query", "value"))
        return {**state, first: state[second], second: state[first]}

    monkeypatch.setattr("tokenbridge.conformance.givt.draw_rule", swapped)


def other_envelope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mend the official constant: density over proposal where the density is, not at the centre."""

    def bound(self: GuidedDensity) -> Tensor:
        points = self.conditional.loc + torch.linspace(-10, 10, 1001).view(-1, *[1] * self.conditional.loc.ndim)
        return (self.log_prob(points) - self.proposal.log_prob(points)).amax(0).exp()

    monkeypatch.setattr(GuidedDensity, "bound", bound)


def other_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend to the newest slot only."""
    original = g.GIVTBlock.forward_cached

    def forgetful(self: g.GIVTBlock, x: Tensor, keys: Tensor, values: Tensor, place: int) -> Tensor:
        return original(self, x, keys[:, :, place:], values[:, :, place:], 0)

    monkeypatch.setattr(g.GIVTBlock, "forward_cached", forgetful)


@pytest.mark.parametrize(
    ("name", "mutation", "output"),
    [
        ("givt-causal-logits", other_gelu, "logits"),
        ("givt-causal-logits", other_epsilon, "logits"),
        ("givt-causal-nolabel", other_names, "logits"),
        ("givt-cfg-density", other_envelope, "cfg_fac"),
        ("givt-sample-step", other_envelope, "cfg_fac"),
        ("givt-sample-step", other_cache, "logits_cond"),
        ("givt-decode", other_cache, "sequences"),
        ("givt-decode-cfg", other_envelope, "fac"),
    ],
)
def test_other_code_is_noticed(name: str, mutation: Any, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    assert output in failed(c.run_file(golden(name)))


def never_accept(meta: dict[str, Any], arrays: Arrays) -> None:
    """Propose the centre alone, at the height of the highest point."""
    meta["config"]["max_samples"] = 1000
    arrays["in.simple_noise"] *= 0
    arrays["in.uniform"] = np.ones_like(arrays["in.uniform"])


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("givt-causal-logits", set_meta("config", "style", to="masked"), "style 'masked' cannot be run"),
        ("givt-causal-logits", set_meta("config", "num_layers", to=2), "num_layers 2 cannot be run: an encoder"),
        ("givt-causal-logits", set_meta("config", "multivariate", to=True), "full covariances"),
        ("givt-causal-logits", set_meta("config", "per_channel_mixtures", to=True), "mixtures of single channels"),
        ("givt-causal-logits", set_meta("config", "num_labels", to=None), "without labels"),
        ("givt-causal-logits", set_meta("config", "drop_labels_probability", to=1.0), "never uses its labels"),
        ("givt-causal-logits", set_meta("config", "num_mixtures", to=4), "the case says 18,683"),
        ("givt-causal-logits", set_meta("config", "rope", to=1), "Unknown configuration keys: rope"),
        ("givt-causal-logits", set_meta("config", "preset", to="huge"), "Unknown preset 'huge'"),
        ("givt-causal-logits", set_meta("arguments", "temp", to=1.0), "Unknown arguments: temp"),
        ("givt-decode", set_meta("arguments", "cfg_inference_weight", to=0.4), r"missing: in\.fallback_noise"),
        ("givt-decode-cfg", set_meta("arguments", "cfg_inference_weight", to=0.0), r"missing: in\.normal"),
        ("givt-decode", set_meta("arguments", "temp", to=0.0), "temperature must be above 0"),
        ("givt-cfg-density", never_accept, "more proposals than the 200"),
        ("givt-cfg-density", set_meta("config", "emb_dim", to=3), "Unknown configuration keys: emb_dim"),
        ("givt-sample-step", set_meta("arguments", "prefix_len", to=6), "not prefix_len"),
        ("givt-vae", set_meta("config", "norm_type", to="BN"), "norm_type 'BN' cannot be run"),
        ("givt-vae", set_meta("config", "pixel_shuffle_patch_size", to=[1, 2]), "patches of latents"),
        ("givt-vae", set_meta("config", "rope", to=1), "Unknown configuration keys: rope"),
    ],
)
def test_what_cannot_be_run_is_a_failure_with_its_reason(name: str, change: Any, reason: str, tmp_path: Path) -> None:
    assert re.search(reason, only_failure(changed(name, tmp_path, change)))


def test_guidance_of_a_model_without_no_class_is_refused(tmp_path: Path) -> None:
    def change(meta: dict[str, Any], arrays: Arrays) -> None:
        meta["config"]["drop_labels_probability"] = 0.0
        del meta["arguments"]["num_params"]

    assert failed(c.run_file(changed("givt-decode", tmp_path, change))) == set()  # the rows of labels are the same
    assert "no embedding for 'no class'" in only_failure(changed("givt-decode-cfg", tmp_path, change))


def test_configurations() -> None:
    model = gg.make_givt({"preset": "givt_causal_256", "num_labels": 7, "dec_dropout_rate": 0.5})
    assert model.config["num_classes"] == 7
    assert sum(p.numel() for p in model.parameters()) == 304_009_744 - 993 * 1024
    bare = complete({}, gg.GIVT_DEFAULTS, gg.GIVT_PRESETS.__getitem__, unused=gg.GIVT_UNUSED)
    assert (bare["emb_dim"], bare["fix_square_plus"], bare["per_channel_mixtures"]) == (512, False, True)
    assert sum(p.numel() for p in gg.make_vae({"preset": "givt_vae"}).parameters()) == 53_032_611


# -------------------------------------------------------------------------------------------------- mixtures


def mixture_of(seed: int, *shape: int, num_channels: int = C, spread: float = 1.0, **settings: float) -> Mixture:
    """Return mixtures of random logits."""
    model = GIVT(**{**TINY, "num_channels": num_channels})
    return model.mixture(numbers(*shape, M * (1 + 2 * num_channels), seed=seed, scale=spread), **settings)


@given(seed=st.integers(0, 2**31), spread=st.floats(0.1, 3), temperature=st.floats(0.3, 2))
def test_mixtures_integrate_to_one(seed: int, spread: float, temperature: float) -> None:
    """Integrate over a plane, in units that resolve the narrowest component and reach past the widest."""
    mixture = mixture_of(seed, num_channels=1, spread=spread, temperature=temperature)
    x = torch.cat(
        [loc + scale * torch.linspace(-8, 8, 801) for loc, scale in zip(mixture.locs, mixture.scales, strict=True)]
    ).sort()[0]
    double = Mixture(*(part.double() for part in (mixture.log_weights, mixture.locs, mixture.scales)))
    assert torch.trapezoid(double.log_prob(x.double()[:, None]).exp(), x.double()).item() == pytest.approx(1, abs=2e-3)


def test_mixtures_of_two_channels_integrate_to_one() -> None:
    mixture = mixture_of(3, num_channels=2)
    axis = torch.linspace(-12, 12, 601)
    points = torch.cartesian_prod(axis, axis)
    mass = mixture.log_prob(points).exp().double().sum() * (axis[1] - axis[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-3)
    # The control: channels are independent within a component, not beyond it.
    marginals = [Mixture(mixture.log_weights, mixture.locs[:, i, None], mixture.scales[:, i, None]) for i in range(2)]
    apart = marginals[0].log_prob(points[:, :1]) + marginals[1].log_prob(points[:, 1:])
    assert not torch.allclose(mixture.log_prob(points), apart, atol=0.1)


def test_mixtures_agree_with_torch() -> None:
    mixture, x = mixture_of(5, 7), numbers(7, C, seed=6)
    theirs = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=mixture.log_weights),
        torch.distributions.Independent(torch.distributions.Normal(mixture.locs, mixture.scales), 1),
    )
    torch.testing.assert_close(mixture.log_prob(x), theirs.log_prob(x))


def test_scales() -> None:
    raw = torch.tensor([-1e4, -2.0, 0.0, 2.0, 1e4])
    logits = torch.cat([torch.zeros(1), torch.zeros(5), raw])
    model = GIVT(**{**TINY, "num_channels": 5, "num_components": 1})
    scales = model.mixture(logits, temperature=0.5).scales[0] * 2
    # Below about -4e3 the sum cancels to 0 in float32, and the floor holds; temperature comes after it.
    torch.testing.assert_close(scales, torch.tensor([1e-6, 2**0.5 - 1, 1.0, 2**0.5 + 1, 1e4]))
    first = GIVT(**{**TINY, "num_channels": 5, "num_components": 1, "fix_square_plus": False}).mixture(logits).scales[0]
    torch.testing.assert_close(first, torch.tensor([1e-6, 1e-6, 1.0, 2 + 2**0.5, 1.5e4]))


def test_temp_probs_sharpens_the_components() -> None:
    soft, sharp = mixture_of(1, 5), mixture_of(1, 5, temp_probs=4.0)
    assert torch.equal(soft.locs, sharp.locs)
    torch.testing.assert_close(sharp.log_weights, (4 * soft.log_weights).log_softmax(-1))


def test_samples_have_the_moments_of_the_density() -> None:
    """20,000 images that share one mixture: six standard errors."""
    n = 20_000
    mixture = mixture_of(2, 1)
    many = Mixture(*(part.expand(n, *part.shape[1:]) for part in (mixture.log_weights, mixture.locs, mixture.scales)))
    x = draw_token(many, None, GivtSampling(), stream(0, list(range(n)))).values
    weights = mixture.log_weights[0].exp()[:, None]
    mean = (weights * mixture.locs[0]).sum(0)
    variance = (weights * (mixture.scales[0] ** 2 + mixture.locs[0] ** 2)).sum(0) - mean**2
    assert ((x.mean(0) - mean).abs() < 6 * (variance / n).sqrt()).all()
    torch.testing.assert_close(x.var(0), variance, rtol=0.08, atol=0)
    # The mean log density is minus the entropy: the same from draws of the components one by one.
    entropy = torch.stack(
        [
            mixture.log_prob(loc + scale * numbers(n, C, seed=k)).mean()
            for k, (loc, scale) in enumerate(zip(mixture.locs[0], mixture.scales[0], strict=True))
        ]
    )
    assert (mixture.log_prob(x).mean() - (weights[:, 0] * entropy).sum()).abs() < 0.05


# ---------------------------------------------------------------------------------------------------- model


@given(st.integers(1, L), st.integers(0, 99))
@torch.no_grad()
def test_cached_equals_uncached_for_any_prefix(length: int, seed: int) -> None:
    latents = numbers(3, length, C, seed=seed)
    expected = MODEL(latents, LABELS)
    cache, x = MODEL.empty_cache(3), MODEL.class_emb(LABELS)
    for position in range(length):
        logits = MODEL.next_logits(x, cache, position)
        torch.testing.assert_close(logits, expected[:, position], rtol=1e-4, atol=1e-5)
        x = MODEL.latent_proj(latents[:, position])


@given(st.integers(0, L - 1))
@torch.no_grad()
def test_the_model_is_causal(position: int) -> None:
    latents = numbers(3, L, C)
    other = latents.clone()
    other[:, position] += 1
    same = torch.isclose(MODEL(latents, LABELS), MODEL(other, LABELS), atol=1e-6).flatten(2).all(-1)
    assert same[:, : position + 1].all()  # the label comes first: position t sees the latents before t
    assert not same[:, position + 1 :].any()


@torch.no_grad()
def test_norms_are_flax_norms() -> None:
    norm = g.LayerNorm(8, bias=True)
    x = numbers(5, 8, seed=1)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (8,), eps=1e-6))
    far = 3000 + x  # mean of squares less square of mean: a float32 of 9e6 is known to about 1
    assert not torch.allclose(norm(far), F.layer_norm(far, (8,), eps=1e-6), atol=0.01)


def test_a_new_model_says_standard_normal() -> None:
    torch.manual_seed(0)
    model = GIVT(**TINY)
    latents = numbers(4, C, 3, 3)
    nll = 0.5 * (latents.square().sum(1) + C * math.log(2 * math.pi)).mean()
    loss = givt_loss(model, latents, torch.zeros(4, dtype=torch.int64))
    assert loss.item() == pytest.approx(nll.item(), rel=1e-5)


def test_loss_is_the_mean_negative_log_likelihood() -> None:
    latents = numbers(3, C, 3, 3)
    sequence = latents.flatten(2).transpose(1, 2)
    nll = -MODEL.mixture(MODEL(sequence, LABELS)).log_prob(sequence)
    assert nll.shape == (3, L)
    torch.testing.assert_close(givt_loss(MODEL, latents, LABELS, label_dropout=0.0), nll.mean())
    assert torch.equal(MODEL.to_latents(MODEL.to_sequence(latents)), latents)


@pytest.mark.parametrize(("share", "trained"), [(0.0, [True, False]), (1.0, [False, True]), (0.5, [True, True])])
def test_label_dropout_trains_the_row_for_no_class(share: float, trained: list[bool]) -> None:
    torch.manual_seed(1)
    model = tiny_givt()
    givt_loss(model, numbers(8, C, 3, 3), torch.zeros(8, dtype=torch.int64), label_dropout=share).backward()
    assert model.class_emb.weight.grad is not None
    used = model.class_emb.weight.grad.abs().sum(1) > 0
    assert used[[0, 5]].tolist() == trained
    assert not used[1:5].any()


def test_training_learns() -> None:
    torch.manual_seed(0)
    model = GIVT(**TINY).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    latents, labels = numbers(16, C, 3, 3, seed=2, scale=0.3) + 1, torch.arange(16) % 5
    first = givt_loss(model, latents, labels).item()
    for _ in range(30):
        loss = givt_loss(model, latents, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 2  # nats, of 3 channels


def test_without_no_class() -> None:
    model = tiny_givt(null_class=False)
    assert model.class_emb.num_embeddings == 5
    with pytest.raises(ValueError, match="no embedding for 'no class'"):
        generate_latents(model, LABELS, GUIDED, lambda i: stream(i, model=model))
    with pytest.raises(ValueError, match="no embedding for 'no class'"):
        givt_loss(model, numbers(3, C, 3, 3), LABELS)


def test_saved_models_load(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path / "givt")
    again = GIVT.from_pretrained(tmp_path / "givt").eval()
    latents = numbers(3, L, C)
    with torch.no_grad():
        assert torch.equal(again(latents, LABELS), MODEL(latents, LABELS))


# -------------------------------------------------------------------------------------------------- DB-CFG


class GivenNoise(gg.StoredNoise):
    """Numbers of many images, from a seed."""

    def __init__(self, n: int, num: int = 1000, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num, n, C, generator=generator), torch.rand(num, n, C, generator=generator)
        super().__init__(simple_noise=noise[0], uniform=noise[1])


def random_density(n: int, seed: int, weight: float, spread: float) -> GuidedDensity:
    """Return densities whose scales differ by factors of about exp(spread)."""
    locs, scales = numbers(2, n, C, seed=seed), numbers(2, n, C, seed=seed + 1, scale=spread).exp()
    return GuidedDensity(Gaussian(locs[0], scales[0]), Gaussian(locs[1], scales[1]), weight)


def reference_draw(density: GuidedDensity, fallback: Tensor, normals: Tensor, uniforms: Tensor) -> Draw:
    """Do the official steps with all proposals at once."""
    x = density.proposal.at(normals)
    heights = uniforms * (density.bound() * density.proposal.log_prob(x).exp())
    accepted = (heights < density.log_prob(x).exp()).numpy()
    first = np.where(accepted.any(0), accepted.argmax(0), -1)
    values = np.take_along_axis(x.numpy(), first[None], 0)[0]
    return Draw(torch.from_numpy(np.where(first >= 0, values, fallback.numpy())), None, torch.from_numpy(first))


@given(st.integers(0, 2**20), st.floats(0, 3), st.floats(0, 4), st.integers(1, 200))
def test_rounds_make_no_difference(seed: int, weight: float, spread: float, num: int) -> None:
    density, noise = random_density(6, seed, weight, spread), GivenNoise(6, num, seed)
    assert noise.simple_noise is not None
    assert noise.uniform is not None
    fallback = numbers(6, C, seed=seed + 2)
    draw = draw_guided(density, fallback, noise, num)
    expected = reference_draw(density, fallback, noise.simple_noise, noise.uniform)
    assert draw.first_accepted is not None
    assert expected.first_accepted is not None
    assert torch.equal(draw.first_accepted, expected.first_accepted)
    assert torch.equal(draw.values, expected.values)
    assert noise.tried <= num


@given(st.integers(0, 2**20), st.sampled_from([0.0, 0.1, 0.4, 3.0]), st.floats(0, 3))
def test_the_constant_is_the_highest_of_the_whole_grid(seed: int, weight: float, spread: float) -> None:
    density = random_density(20, seed, weight, spread)
    points = density.conditional.loc + torch.linspace(-10, 10, 1001).view(-1, 1, 1)
    log_probs = density.log_prob(points)
    expected = log_probs.amax(0) - density.proposal.log_prob(density.conditional.loc)
    bound = density.bound()
    assert torch.equal(bound.isinf(), (log_probs.exp() / density.proposal.log_prob(points[500]).exp()).amax(0).isinf())
    finite = bound.isfinite()
    # The same formula at the same points, to the rounding of its two large terms.
    size = density.conditional.log_prob(points).abs().amax(0) + density.unconditional.log_prob(points).abs().amax(0)
    assert ((bound.log() - expected).abs() <= 1e-6 * (1 + size))[finite].all()


def test_guidance_of_equal_mixtures_is_the_mixture() -> None:
    """N^(1+w) / N^w = N: the constant is a true envelope then, and the draws are normal."""
    n = 10_000
    same = Gaussian(torch.full((n, C), 0.7), torch.tensor([0.1, 1.0, 3.0]).expand(n, C))
    draw = draw_guided(GuidedDensity(same, same, 0.8), torch.full((n, C), torch.nan), GivenNoise(n, 100), 100)
    standard = (draw.values - 0.7) / same.scale
    assert standard.mean(0).abs().max() < 0.06  # six standard errors
    assert (standard.std(0) - 1).abs().max() < 0.05
    assert ((standard.abs() < 1).float().mean(0) - 0.6827).abs().max() < 0.03
    assert draw.bound is not None
    torch.testing.assert_close(draw.bound, torch.full((n, C), 2.0))


def test_guidance_moves_away_from_the_unconditional() -> None:
    """Of two normals of one width the guided density is the conditional, w times their distance further."""
    n, weight = 10_000, 0.4
    zero, one = torch.zeros(n, C), torch.ones(n, C)
    draw = draw_guided(GuidedDensity(Gaussian(one, one), Gaussian(zero, one), weight), one, GivenNoise(n, 100), 100)
    assert (draw.values.mean(0) - 1.4).abs().max() < 0.06
    assert (draw.values.std(0) - 1).abs().max() < 0.05


@given(st.integers(0, 2**20))
def test_weight_zero_is_no_guidance(seed: int) -> None:
    density = random_density(5, seed, 0.0, 1.0)
    x = numbers(4, 5, C, seed=seed)
    assert torch.equal(density.log_prob(x), density.conditional.log_prob(x))
    config = GivtSampling(temperature=0.9)
    plain = generate_latents(MODEL, LABELS, config, lambda i: stream(i, seed=seed))
    blind = tiny_givt(null_class=False)  # it cannot be guided
    blind.load_state_dict({**MODEL.state_dict(), "class_emb.weight": MODEL.class_emb.weight[:5]})
    assert torch.equal(plain, generate_latents(blind, LABELS, config, lambda i: stream(i, seed=seed)))
    assert not torch.equal(plain, generate_latents(MODEL, LABELS, GUIDED, lambda i: stream(i, seed=seed)))


def test_overflow_leads_to_the_conditional_draw() -> None:
    """A narrow unconditional Gaussian: the density grows beyond float32, and nothing is accepted."""
    one = torch.ones(2, C)
    density = GuidedDensity(Gaussian(0 * one, one), Gaussian(0 * one, one * torch.tensor([1.0, 0.05, 1.0])), 0.4)
    fallback, noise = numbers(2, C), GivenNoise(2)
    draw = draw_guided(density, fallback, noise, 1000)
    assert draw.bound is not None
    assert draw.first_accepted is not None
    assert draw.bound.isinf().tolist() == [[False, True, False]] * 2
    assert (draw.first_accepted >= 0).tolist() == [[True, False, True]] * 2
    assert torch.equal(draw.values[:, 1], fallback[:, 1])
    assert not torch.isclose(draw.values[:, [0, 2]], fallback[:, [0, 2]]).any()
    assert noise.tried <= 64  # what cannot be accepted is not tried a thousand times


def test_too_few_proposals_lead_to_the_conditional_draw() -> None:
    one = torch.ones(50, C)
    density = GuidedDensity(Gaussian(0 * one, one), Gaussian(0 * one, 0.4 * one), 0.4)  # finite, and never accepted
    fallback, noise = numbers(50, C), GivenNoise(50)
    draw = draw_guided(density, fallback, noise, 300)
    assert draw.first_accepted is not None
    assert draw.bound is not None
    assert draw.bound.isfinite().all()
    missed = draw.first_accepted < 0
    assert missed.float().mean() > 0.5
    assert torch.equal(draw.values[missed], fallback[missed])
    assert noise.tried == 300


# -------------------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def tokenizer() -> LatentTokenizer:
    torch.manual_seed(0)
    return LatentTokenizer(GivtVAE(latent_channels=C, width=32, width_multipliers=(1, 1), num_res_blocks=1))


@pytest.mark.parametrize("config", [GUIDED, GivtSampling()], ids=["guided", "plain"])
def test_an_image_does_not_depend_on_its_batch(config: GivtSampling, tokenizer: LatentTokenizer) -> None:
    labels = torch.tensor([0, 4, 2, 2, 1])
    images = sample_images("givt", MODEL, tokenizer, config, labels, seed=3)
    assert images.shape == (5, 3, 6, 6)
    assert images.dtype == torch.uint8
    for size in (1, 2):
        alone = sample_images("givt", MODEL, tokenizer, config, labels, seed=3, batch_size=size)
        # Sums in another order move latents by 1e-6, and so a pixel by one step here and there.
        assert (images.int() - alone.int()).abs().max() <= 1
        assert (images != alone).float().mean() < 0.01
    other = sample_images("givt", MODEL, tokenizer, config, labels, seed=4)
    assert (images != other).float().mean() > 0.5
    assert not torch.equal(images[2], images[3])  # one label, two images


def test_streams_are_drawn_per_image_and_position() -> None:
    together, alone = stream(4, [7, 8, 9]), stream(4, [8])
    assert torch.equal(together.gumbels()[1:2], alone.gumbels())
    component = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(together.normals(component)[1:2], alone.normals(component[:1]))
    together.proposals(torch.tensor([0, 1]), 32)
    first = alone.proposals(torch.tensor([0]), 32)
    again = stream(4, [8])
    again.gumbels()
    again.normals(component)
    assert torch.equal(first[0], again.proposals(torch.tensor([0]), 32)[0])
    later = together.proposals(torch.tensor([1, 2]), 32)
    assert torch.equal(later[0][:, :1], alone.proposals(torch.tensor([0]), 32)[0])
    assert first[0].shape == first[1].shape == (32, 1, C)
    for other in (stream(5, [8]), stream(4, [9]), stream(4, [8], seed=1)):
        assert not torch.equal(other.gumbels(), stream(4, [8]).gumbels())


def test_stream_numbers_have_their_distributions() -> None:
    noise = stream(0, list(range(2000)))
    gumbels = noise.gumbels()
    assert gumbels.mean().item() == pytest.approx(0.5772, abs=0.08)
    assert gumbels.var().item() == pytest.approx(math.pi**2 / 6, rel=0.1)
    normals = noise.normals(torch.zeros(2000, dtype=torch.int64))
    assert normals.mean().abs() < 0.08
    proposals, uniforms = noise.proposals(torch.arange(2000), 32)
    assert proposals.std().item() == pytest.approx(1, abs=0.02)
    assert uniforms.mean().item() == pytest.approx(0.5, abs=0.01)
    assert 0 <= uniforms.min() and uniforms.max() < 1  # noqa: PT018


def test_generated_latents_are_likely() -> None:
    """Draws of the model at temperature 1 have the log likelihood that teacher forcing gives them on average."""
    labels = torch.arange(300) % 5
    latents = generate_latents(MODEL, labels, GivtSampling(), lambda i: stream(i, list(range(300))))
    with torch.no_grad():
        nll = givt_loss(MODEL, latents, labels, label_dropout=0.0).item()
        shuffled = givt_loss(MODEL, latents[:, :, torch.randperm(3)].flip(2, 3), labels, label_dropout=0.0).item()
        wrong = givt_loss(MODEL, latents.roll(1, 0), labels, label_dropout=0.0).item()
        cold = generate_latents(MODEL, labels, GivtSampling(temperature=0.5), lambda i: stream(i, list(range(300))))
        assert givt_loss(MODEL, cold, labels, label_dropout=0.0).item() < nll
    assert nll < wrong
    assert nll < shuffled


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"temp_probs": -1.0}, "temp_probs must be above 0"),
        ({"guidance_weight": -0.1}, "weight must be at least 0"),
        ({"guidance_weight": float("inf")}, "weight must be at least 0"),
        ({"num_proposals": 0}, "at least 1, not 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GUIDED, **settings)


def test_bad_requests_are_refused(tokenizer: LatentTokenizer) -> None:
    with pytest.raises(ValueError, match=r"span \[0, 5\], but the model has the classes 0 to 4"):
        sample_images("givt", MODEL, tokenizer, GUIDED, torch.tensor([0, 5]), seed=0)
    with pytest.raises(ValueError, match="The seed must be at least 0"):
        sample_images("givt", MODEL, tokenizer, GUIDED, LABELS, seed=-1)
    with pytest.raises(ValueError, match="at least 1"):
        sample_images("givt", MODEL, tokenizer, GUIDED, LABELS[:0], seed=0)
