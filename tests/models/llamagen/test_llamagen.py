"""LlamaGen's GPT: cache, rotary embedding, filters of logits, sampling, official names and files."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from official_names import from_official, layout, load_official, rule_state, to_official
from published import published_shapes
from samplers import sample_images
from scipy import stats
from torch import Tensor
from waits import Waits

from tokenbridge.data.images import images_to_pixels
from tokenbridge.models.draw import token_chooser
from tokenbridge.models.llamagen import checkpoint as llamagen_checkpoint
from tokenbridge.models.llamagen import model as lg
from tokenbridge.models.llamagen import presets as llamagen_presets
from tokenbridge.models.llamagen import sampling as llamagen_sampling
from tokenbridge.models.llamagen.model import LlamaGen
from tokenbridge.models.llamagen.sampling import LlamaGenSampling
from tokenbridge.models.noise import image_noise
from tokenbridge.results.ledger import published_metrics
from tokenbridge.weights.artifacts import ARTIFACTS
from tokenbridge.weights.diffusers import load_model, save_model
from tokenbridge.weights.published import Preset

SMALL: dict[str, Any] = {
    "latent_size": 3,
    "num_codes": 24,
    "num_classes": 5,
    "width": 32,
    "depth": 2,
    "num_heads": 4,
    "hidden_multiple": 16,
}
ROUNDING: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}  # float32 sums in another order; logits are of order 1


def empty(**changes: Any) -> LlamaGen:
    with torch.device("meta"):
        return LlamaGen(**{**SMALL, **changes}).eval()


def small(**changes: Any) -> LlamaGen:
    """Return a model with the goldens' weights: at initialisation the output layer is zero."""
    model = empty(**changes)
    load_official(model, rule_state(model, {"rule": "fan-in-normal-v1", "salt": "llamagen"}))
    return model


MODEL = small()
SHARING = small(num_kv_heads=2)  # two query heads to a key/value head
GUIDED = LlamaGenSampling(guidance_scale=2.0, temperature=0.9, top_k=12, top_p=0.9)


def uniforms(seed: int, indices: list[int], model: LlamaGen = MODEL) -> Tensor:
    return image_noise(seed, indices, model.num_positions, 1).uniforms[..., 0]


# ----------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", llamagen_presets.PRESETS)
def test_parameters_of_a_preset(name: str) -> None:
    preset, model = llamagen_presets.PRESETS[name], llamagen_presets.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == preset.num_parameters
    assert model.device.type == "meta"
    assert model.num_positions == (256 if name.endswith("-256") else 576)
    shapes = {key: mapping.shape for key, mapping in layout(model).mappings.items()}
    assert shapes == published_shapes(preset.official_name)


def test_presets_and_their_sources() -> None:
    assert len(ARTIFACTS.keys() & llamagen_presets.PRESETS.keys()) == 7
    for name, preset in llamagen_presets.PRESETS.items():
        scores = published_metrics(f"table3/{name}")
        assert bool(scores) == (name in ARTIFACTS)  # a score was published of every file, and no other
        assert all("FoundationVision/LlamaGen" in recipe.source for recipe in preset.sampling.values())
    assert llamagen_presets.PRESETS["llamagen-3b-384"].sampling_config() == LlamaGenSampling(guidance_scale=1.65)
    with pytest.raises(ValueError, match="No sampling settings were published"):
        llamagen_presets.PRESETS["llamagen-xl-256"].sampling_config()
    with pytest.raises(ValueError, match="Unknown preset 'llamagen-s-256'"):
        llamagen_presets.create_model("llamagen-s-256")


@given(st.integers(1, 5000), st.integers(1, 512), st.none() | st.floats(0.1, 4))
def test_hidden_width_is_rounded_up(width: int, multiple: int, factor: float | None) -> None:
    hidden = lg.hidden_width(width, factor, multiple)
    exact = math.floor(8 * width / 3) if factor is None else math.floor(factor * math.floor(8 * width / 3))
    assert hidden % multiple == 0
    assert exact <= hidden < exact + multiple


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_heads": 5}, "must each be a multiple"),
        ({"num_kv_heads": 3}, "must each be a multiple"),
        ({"width": 24}, "head width 6 is not a multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        empty(**changes)


# ----------------------------------------------------------------------------------------------- cache


@given(
    seed=st.integers(0, 2**31),
    num_tokens=st.integers(1, 9),
    scale=st.sampled_from([0.0, 0.5, 1.0, 1.5, 4.0]),
    num_guided=st.none() | st.integers(0, 10),
    shares=st.booleans(),
)
def test_cached_logits_equal_those_of_the_whole_prefix(
    seed: int, num_tokens: int, scale: float, num_guided: int | None, shares: bool
) -> None:
    """Forced tokens through the cached path; the reference recomputes every prefix, once with and once without."""
    model = SHARING if shares else MODEL
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(24, (3, num_tokens), generator=generator)
    labels = torch.randint(5, (3,), generator=generator)
    seen = []

    def pick(logits: Tensor, place: int) -> Tensor:
        seen.append(logits)
        return tokens[:, place]

    with torch.inference_mode():
        assert torch.equal(
            model.sample(labels, pick, guidance_scale=scale, num_guided=num_guided, num_tokens=num_tokens), tokens
        )
        for place, logits in enumerate(seen):
            conditional = model(tokens[:, :place], labels)[:, -1]
            unconditional = model(tokens[:, :place], torch.full_like(labels, 5))[:, -1]
            guided = scale > 1 and (num_guided is None or place < num_guided)
            expected = unconditional + scale * (conditional - unconditional) if guided else conditional
            torch.testing.assert_close(logits, expected, **ROUNDING)


@given(st.integers(0, 7), st.integers(0, 2**31))
@torch.inference_mode()
def test_a_token_changes_what_comes_after_it_alone(place: int, seed: int) -> None:
    tokens = torch.randint(24, (2, 8), generator=torch.Generator().manual_seed(seed))
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % 24
    labels = torch.tensor([1, 3])
    difference = (MODEL(tokens, labels) - MODEL(changed, labels)).abs().amax(-1)
    assert (difference[:, : place + 1] == 0).all()
    assert (difference[:, place + 1 :] > 1e-3).all()


# ---------------------------------------------------------------------------------------------- rotary

TABLE = lg.rotary_table(5, 16)  # 5 x 5 positions after the class


def score(query: Tensor, key: Tensor, i: int, j: int) -> Tensor:
    """Return the score of a query at element i and a key at element j."""
    return lg.rotate(query[None], TABLE[i : i + 1]).flatten() @ lg.rotate(key[None], TABLE[j : j + 1]).flatten()


vectors = st.integers(0, 2**31).map(lambda seed: torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(seed)))


@given(vectors, *[st.integers(0, 3)] * 4)
def test_scores_follow_from_the_difference_of_rows_and_columns(pair: Tensor, r: int, c: int, s: int, d: int) -> None:
    query, key = pair
    here = score(query, key, 1 + 5 * r + c, 1 + 5 * s + d)
    one_down, one_right = (
        score(query, key, 6 + 5 * r + c, 6 + 5 * s + d),
        score(query, key, 2 + 5 * r + c, 2 + 5 * s + d),
    )
    torch.testing.assert_close(torch.stack([one_down, one_right]), here.expand(2), atol=1e-4, rtol=0)


@given(vectors, st.integers(0, 25))
def test_the_class_token_is_no_position(pair: Tensor, i: int) -> None:
    """The quirk: its query and key are zero, so all its scores are; the difference of places plays no part."""
    query, key = pair
    assert score(query, key, i, 0) == 0
    assert score(query, key, 0, i) == 0
    assert i == 0 or score(query, query, i, i) > 1e-3  # elsewhere a rotation keeps lengths
    torch.testing.assert_close(lg.rotate(query[None], TABLE[i : i + 1]).norm(), query.norm() * (i > 0))


def test_rows_turn_the_first_half_columns_the_second() -> None:
    angles = torch.atan2(TABLE[..., 1], TABLE[..., 0])
    row, column = angles[1 + 5 * 2], angles[1 + 3]  # (2, 0), (0, 3)
    frequencies = torch.tensor([10000.0 ** (-4 * i / 16) for i in range(4)])
    torch.testing.assert_close(row, torch.cat([2 * frequencies, torch.zeros(4)]))
    torch.testing.assert_close(column, torch.cat([torch.zeros(4), 3 * frequencies]))


@torch.inference_mode()
def test_the_table_stays_exact_in_half_precision(tmp_path: Path) -> None:
    """It is computed, not stored: saving in half precision rounds the weights, and nothing else."""
    model = small()
    save_model(model, tmp_path / "model")
    loaded = load_model(LlamaGen, tmp_path / "model", expected=SMALL)
    tokens, labels = torch.arange(16).view(2, 8), torch.tensor([0, 4])
    assert torch.equal(loaded(tokens, labels), model(tokens, labels))
    assert torch.equal(loaded.rotary_rows(), MODEL.rotary_rows())
    half = small().to(torch.bfloat16)
    assert half.rotary_rows().dtype == torch.float32
    seen = []

    def pick(logits: Tensor, place: int) -> Tensor:
        seen.append(logits)
        return tokens[:, place]

    half.sample(labels, pick, num_tokens=8)
    # bfloat16 has 8 bits: some 1 % of logits of order 1.
    torch.testing.assert_close(torch.stack(seen, 1), MODEL(tokens[:, :7], labels), atol=0.1, rtol=0)


# ---------------------------------------------------------------------------------------------- filters

logits_lists = st.lists(st.integers(-40, 40), min_size=1, max_size=30).map(lambda x: torch.tensor([x]) / 4.0)  # ties


@given(logits_lists, st.integers(0, 35), st.floats(0.01, 1))
def test_filters_keep_the_largest_unchanged(logits: Tensor, top_k: int, top_p: float) -> None:
    filtered = llamagen_sampling.filter_logits(logits, top_k=top_k, top_p=top_p)
    kept = filtered.isfinite()
    assert kept.gather(1, logits.argmax(-1, keepdim=True)).all()
    assert torch.equal(filtered[kept], logits[kept])
    assert (filtered[~kept] == -math.inf).all()
    assert kept.all() or logits[kept].min() >= logits[~kept].max()


@given(logits_lists, st.integers(1, 35))
def test_top_k_keeps_k_and_what_is_tied_with_the_last(logits: Tensor, top_k: int) -> None:
    kept = llamagen_sampling.filter_logits(logits, top_k=top_k).isfinite()
    smallest = logits.flatten().sort(descending=True).values[: min(top_k, logits.shape[1])][-1]
    assert torch.equal(kept, logits >= smallest)
    assert kept.sum() >= min(top_k, logits.shape[1])


@given(logits_lists, st.floats(0.01, 0.999))
def test_top_p_keeps_the_fewest_that_pass(logits: Tensor, top_p: float) -> None:
    kept = llamagen_sampling.filter_logits(logits, top_p=top_p).isfinite()
    probabilities = logits.double().softmax(-1)
    total = probabilities[kept].sum()
    slack = 1e-6  # of a float32 sum
    assert total >= min(top_p, 1) - slack
    assert total - probabilities[kept].min() <= top_p + slack  # without the last, the threshold is not passed


@given(logits_lists, st.floats(0.01, 0.999), st.floats(0.01, 0.999), st.integers(1, 35))
def test_filters_are_monotone_and_top_k_comes_first(logits: Tensor, p: float, q: float, top_k: int) -> None:
    few, many = (llamagen_sampling.filter_logits(logits, top_p=x).isfinite() for x in sorted((p, q)))
    assert (many | ~few).all()
    both = llamagen_sampling.filter_logits(logits, top_k=top_k, top_p=p)
    assert torch.equal(
        both, llamagen_sampling.filter_logits(llamagen_sampling.filter_logits(logits, top_k=top_k), top_p=p)
    )
    assert torch.equal(llamagen_sampling.filter_logits(logits), logits)


def test_what_passes_the_threshold_stays() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert (
        llamagen_sampling.filter_logits(logits, top_p=0.6).isfinite().sum() == 2
    )  # 0.5 alone is less than 0.6: the next one stays
    assert llamagen_sampling.filter_logits(logits, top_p=0.85).isfinite().sum() == 3
    # Top-k first: of two tokens left, 0.5 has 0.625 of the mass, and passes 0.6 alone. Last, it would change nothing.
    assert llamagen_sampling.filter_logits(logits, top_k=2, top_p=0.6).isfinite().sum() == 1
    before = llamagen_sampling.filter_logits(logits, top_p=0.6)
    assert llamagen_sampling.filter_logits(before, top_k=2).isfinite().sum() == 2


def test_the_temperature_comes_before_the_filters() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    seen: list[Tensor] = []

    def keep(scaled: Tensor) -> Tensor:
        seen.append(scaled)
        return scaled

    token_chooser(2.0, torch.tensor([[0.5]]), keep)(logits, 0)
    torch.testing.assert_close(seen[0].softmax(-1), (logits / 2).softmax(-1))
    kept = [llamagen_sampling.filter_logits(x, top_p=0.7).isfinite().sum().item() for x in (seen[0], logits)]
    assert kept == [3, 2]


# --------------------------------------------------------------------------------------------- sampling


def test_tokens_follow_the_filtered_distribution() -> None:
    """One position: 20,000 images of one class against the distribution; guidance, temperature, top-k and top-p."""
    n, model = 20_000, small(latent_size=1, num_codes=16)
    config = LlamaGenSampling(guidance_scale=1.5, temperature=1.3, top_k=6, top_p=0.95)
    tokens = llamagen_sampling.generate_tokens(
        model, torch.full((n,), 2), config, torch.rand(n, 1, generator=torch.manual_seed(0))
    )
    counts = tokens.flatten().bincount(minlength=16)
    with torch.inference_mode():
        conditional, unconditional = model(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([2, 5]))[:, -1]

    def fits(scale: float, temperature: float, top_k: int, top_p: float) -> bool:
        guided = unconditional + scale * (conditional - unconditional)
        expected = (
            llamagen_sampling.filter_logits(guided[None] / temperature, top_k=top_k, top_p=top_p)[0]
            .double()
            .softmax(-1)
        )
        if (counts[expected == 0] > 0).any():
            return False
        there = expected > 0
        return bool(stats.chisquare(counts[there].numpy(), n * expected[there].numpy()).pvalue > 1e-3)

    assert fits(1.5, 1.3, 6, 0.95)
    assert not fits(1.0, 1.3, 6, 0.95)  # mutations
    assert not fits(1.5, 1.0, 6, 0.95)
    assert not fits(1.5, 1.3, 5, 0.95)
    assert not fits(1.5, 1.3, 6, 0.6)


def test_an_image_does_not_depend_on_its_batch() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    together = llamagen_sampling.generate_tokens(MODEL, labels, GUIDED, uniforms(7, list(range(6))))
    alone = [llamagen_sampling.generate_tokens(MODEL, labels[i : i + 1], GUIDED, uniforms(7, [i])) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))
    assert together.shape == (6, 9)
    assert not torch.equal(together[0], together[5])  # of the same class, but another image
    assert not torch.equal(
        together, llamagen_sampling.generate_tokens(MODEL, labels, GUIDED, uniforms(8, list(range(6))))
    )


def test_images_in_batches() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4])

    class Codes:
        """A tokenizer whose images are the codes themselves."""

        def images(self, codes: Tensor) -> Tensor:
            assert codes.shape[1:] == (3, 3)
            return codes[:, None] / 12.0 - 1

        def to_pixels(self, images: Tensor) -> Tensor:
            return images_to_pixels(images)

    whole, pieces = (sample_images("llamagen", MODEL, Codes(), GUIDED, labels, 3, batch_size=size) for size in (250, 2))
    assert torch.equal(whole, pieces)
    assert whole.shape == (5, 1, 3, 3)
    with pytest.raises(ValueError, match="at least 1"):
        sample_images("llamagen", MODEL, Codes(), GUIDED, labels[:0], 3)


def test_temperature_zero_takes_the_most_likely() -> None:
    greedy = replace(GUIDED, temperature=0)
    labels = torch.tensor([1, 2])
    first, second = (
        llamagen_sampling.generate_tokens(MODEL, labels, greedy, uniforms(seed, [0, 1])) for seed in (0, 1)
    )
    assert torch.equal(first, second)
    only = llamagen_sampling.generate_tokens(MODEL, labels, replace(GUIDED, top_k=1), uniforms(0, [0, 1]))
    assert torch.equal(first, only)


def test_labels_that_are_none() -> None:
    for labels in ([5], [-1], [0, 1]):
        with pytest.raises(ValueError, match=r"[Ll]abel"):
            llamagen_sampling.generate_tokens(MODEL, torch.tensor(labels), GUIDED, uniforms(0, [0]))


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": -1.0},
        {"guidance_scale": math.nan},
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"num_guided": -1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_settings_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(GUIDED, **changes)


def test_loop_does_not_wait_for_the_device() -> None:
    """More tokens make no more synchronisations: what there is, is before the loop."""
    counts = []
    for latent_size in (2, 4):
        model = small(latent_size=latent_size)
        noise = uniforms(0, [0, 1, 2], model)
        with Waits() as waits:
            llamagen_sampling.generate_tokens(model, torch.arange(3), replace(GUIDED, num_guided=3), noise)
        counts.append(waits.count)
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------------------------- loss


def test_loss_is_the_cross_entropy_of_all_tokens() -> None:
    tokens = torch.randint(24, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3])
    for label_dropout, seen in ((0.0, labels), (1.0, torch.full_like(labels, 5))):
        expected = torch.stack([F.cross_entropy(MODEL(tokens[:, :i], seen)[:, -1], tokens[:, i]) for i in range(9)])
        loss = lg.llamagen_loss(MODEL, tokens, labels, label_dropout=label_dropout)
        torch.testing.assert_close(loss, expected.mean(), **ROUNDING)
    fresh = LlamaGen(**SMALL)
    assert lg.llamagen_loss(fresh, tokens, labels).item() == pytest.approx(math.log(24))  # the output layer is zero


def test_dropped_labels_train_the_row_of_no_class() -> None:
    model = small(dropout=0.5).train()
    tokens, labels = torch.zeros(50, 9, dtype=torch.int64), torch.arange(50) % 5
    torch.manual_seed(0)
    losses = [lg.llamagen_loss(model, tokens, labels, label_dropout=0.5) for _ in range(2)]
    assert losses[0] != losses[1]  # dropout
    losses[0].backward()
    gradient = model.class_embedding.weight.grad
    assert gradient is not None
    assert (gradient.abs().amax(1) > 0).all()
    model.zero_grad()
    lg.llamagen_loss(model, tokens, labels, label_dropout=0.0).backward()
    assert (model.class_embedding.weight.grad[-1] == 0).all()


# ------------------------------------------------------------------------------- official names and files

STATE = to_official(MODEL)


def test_there_and_back() -> None:
    assert "cls_embedding.embedding_table.weight" in STATE
    back = from_official(empty(), STATE)
    assert back.keys() == dict(MODEL.named_parameters()).keys()
    assert all(torch.equal(back[name], parameter) for name, parameter in MODEL.named_parameters())


@torch.inference_mode()
def test_two_tensors_that_change_places_are_noticed() -> None:
    """The control of the mapping: shapes cannot tell the SwiGLU's gate from its value, the numbers do."""
    gate, value = (f"layers.1.feed_forward.{name}.weight" for name in ("w1", "w3"))
    other = empty()
    load_official(other, {**STATE, gate: STATE[value], value: STATE[gate]})
    tokens, labels = torch.arange(8)[None], torch.tensor([2])
    assert (other(tokens, labels) - MODEL(tokens, labels)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm.weight": None}, r"1 missing: norm\.weight"),
        ({"layers.0.attention.bias": torch.zeros(1)}, r"1 left over: layers\.0\.attention\.bias"),
        ({"tok_embeddings.weight": torch.zeros(25, 32)}, "of another shape"),
        ({"output.weight": torch.zeros(24, 32, dtype=torch.int64)}, "not floating point"),
    ],
)
def test_loading_is_strict(changes: dict[str, Tensor | None], reason: str) -> None:
    state = {name: value for name, value in (STATE | changes).items() if value is not None}
    with pytest.raises(ValueError, match=f"not the state of LlamaGen .*{reason}"):
        from_official(empty(), state)


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> str:
    """A preset small enough for a file."""
    small_preset = Preset(name="small", model=SMALL, num_parameters=0)
    monkeypatch.setitem(llamagen_presets.PRESETS, "small", small_preset)
    return "small"


LAYOUTS: dict[str, Any] = {
    "ddp": {"model": STATE, "optimizer": {"state": {}}, "steps": 3, "args": argparse.Namespace(gpt_model="GPT-B")},
    "deepspeed": {"module": STATE, "epoch": 1},
    "lightning": {"state_dict": STATE},
    "fsdp": STATE,
    "with-table": STATE | {"freqs_cis": MODEL.rotary_rows()},
    "with-half-table": STATE | {"freqs_cis": MODEL.rotary_rows().bfloat16()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_file(layout: str, preset: str, tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout], tmp_path / "c2i.pt")
    model = llamagen_checkpoint.load_llamagen(tmp_path / "c2i.pt", preset)
    assert not model.training
    (tmp_path / "c2i.pt").unlink()  # nothing in the model depends on the file any longer
    assert all(torch.equal(value, STATE[name]) for name, value in to_official(model).items())


class Code:
    """Something that torch.load would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"ema": STATE}, "no weights, bare or under model, module, state_dict; it has keys"),
        ({"model": {}}, "no weights"),
        ({"model": {"norm.weight": 1.0}}, "no weights"),
        ([1, 2], "it has a list"),
        ({"model": STATE, "hook": Code()}, "pickled code"),
        ({"model": STATE | {"more": torch.zeros(1)}}, "1 left over: more"),
        (STATE | {"freqs_cis": lg.rotary_table(4, 8)}, "rotary table"),
        (STATE | {"freqs_cis": lg.rotary_table(3, 8, base=100.0)}, "rotary table"),
    ],
)
def test_files_that_are_not_what_they_should_be(content: Any, reason: str, preset: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "c2i.pt")
    with pytest.raises(ValueError, match=rf"c2i\.pt.*{reason}"):
        llamagen_checkpoint.load_llamagen(tmp_path / "c2i.pt", preset)


def test_a_file_that_is_not_there(preset: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*c2i\.pt"):
        llamagen_checkpoint.load_llamagen(tmp_path / "c2i.pt", preset)
