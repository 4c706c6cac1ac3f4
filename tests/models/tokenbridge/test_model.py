"""The generator: what its context depends on, its loss, saving, numbers of the official code."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Golden, load_golden, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenbridge.models.layers import take
from tokenbridge.models.tokenbridge import model as generator_module
from tokenbridge.models.tokenbridge.model import TokenBridge, generator_loss
from tokenbridge.tokenizers.quantizer import lloyd_max_quantizer

B, L, C, V = 3, TINY["latent_size"] ** 2, TINY["num_channels"], TINY["num_levels"]
LABELS = torch.tensor([0, 3, 4])
MODEL = tiny_model()

# The same float32 sums in another order: about 1e-6 on values of size 1.
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}

cases = st.tuples(st.integers(0, 10**6), st.integers(0, L - 1))  # seed, number of visible positions


def scene(seed: int, num_visible: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random tokens [B, L, C], visible positions [B, n] and masked ones [B, L - n]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (B, L, C), generator=generator)
    order = torch.rand(B, L, generator=generator).argsort(dim=1)
    return tokens, order[:, :num_visible].sort(dim=1).values, order[:, num_visible:].sort(dim=1).values


def latents(seed: int, batch: int = B) -> Tensor:
    size = TINY["latent_size"]
    return torch.randn(batch, C, size, size, generator=torch.Generator().manual_seed(seed))


# Context


@given(cases, st.data())
@torch.no_grad()
def test_context_of_some_positions_is_that_part_of_all(case: tuple[int, int], data: st.DataObject) -> None:
    tokens, visible, _ = scene(*case)
    some = data.draw(st.lists(st.integers(0, L - 1), min_size=1, max_size=L, unique=True))
    positions = torch.tensor(some).expand(B, -1)
    z = MODEL.context(tokens, visible, LABELS)
    assert z.shape == (B, L, TINY["width"])
    torch.testing.assert_close(MODEL.context(tokens, visible, LABELS, positions=positions), take(z, positions), **CLOSE)


@given(cases)
@torch.no_grad()
def test_order_of_visible_positions_does_not_matter(case: tuple[int, int]) -> None:
    tokens, visible, _ = scene(*case)
    z = MODEL.context(tokens, visible, LABELS)
    torch.testing.assert_close(MODEL.context(tokens, visible.flip(1), LABELS), z, **CLOSE)


@given(cases)
@torch.no_grad()
def test_masked_tokens_do_not_leak(case: tuple[int, int]) -> None:
    tokens, visible, masked = scene(*case)
    changed = tokens.scatter(1, masked[..., None].expand(-1, -1, C), 0)
    z = MODEL.context(tokens, visible, LABELS)
    assert torch.equal(MODEL.context(changed, visible, LABELS), z)


@given(st.integers(0, 10**6), st.integers(1, L - 1))
@torch.no_grad()
def test_visible_tokens_and_labels_matter(seed: int, num_visible: int) -> None:
    tokens, visible, masked = scene(seed, num_visible)
    z = take(MODEL.context(tokens, visible, LABELS), masked)
    changed = tokens.scatter(1, visible[:, :1, None].expand(-1, -1, C), (tokens + V // 2) % V)
    if not torch.equal(take(changed, visible), take(tokens, visible)):
        assert (take(MODEL.context(changed, visible, LABELS), masked) - z).abs().max() > 1e-4
    assert (take(MODEL.context(tokens, visible, (LABELS + 1) % 5), masked) - z).abs().max() > 1e-4


@torch.no_grad()
def test_dropped_labels_are_no_class() -> None:
    tokens, visible, _ = scene(0, 5)
    none, classes = MODEL.context(tokens, visible, None), MODEL.context(tokens, visible, LABELS)
    dropped = torch.tensor([True, False, True])
    mixed = MODEL.context(tokens, visible, LABELS, dropped=dropped)
    torch.testing.assert_close(mixed, torch.where(dropped[:, None, None], none, classes), **CLOSE)
    assert (none - classes).abs().amax(dim=(1, 2)).min() > 1e-2


def test_sequences_and_latents() -> None:
    x = latents(0)
    sequence = MODEL.to_sequence(x)
    assert sequence.shape == (B, L, C)
    assert torch.equal(sequence[:, 5], x[:, :, 1, 1])  # raster order: position 5 of a 4 x 4 grid
    tokens = MODEL.quantizer.encode(sequence)
    assert torch.equal(MODEL.to_latents(tokens), MODEL.quantizer(x))


@torch.no_grad()
def test_logits_are_in_generation_order() -> None:
    tokens, visible, masked = scene(0, 5)
    before = MODEL(tokens, LABELS, visible, masked)
    assert before.shape == (B, L - 5, C, V)
    changed = tokens.clone()
    changed[..., TINY["channel_order"][1]] = (changed[..., TINY["channel_order"][1]] + 1) % V
    masked_changed = torch.where(torch.isin(torch.arange(L), visible[0])[:, None], tokens[0], changed[0])
    after = MODEL(masked_changed[None], LABELS[:1], visible[:1], masked[:1])
    different = (after - before[:1]).abs().amax(dim=(0, 1, 3)) > 1e-4
    assert different.tolist() == [False, False, True, True]  # the second generated matters for those after it


# Loss


def recorded_loss(seed: int, **settings: Any) -> tuple[float, dict[str, Any]]:
    """Return a loss of MODEL, and what the loss called it with."""
    calls: list[dict[str, Any]] = []

    def record(
        tokens: Tensor, labels: Tensor, visible: Tensor, positions: Tensor, *, dropped: Tensor, **rest: Any
    ) -> Tensor:
        calls.append({"tokens": tokens, "visible": visible, "positions": positions, "dropped": dropped})
        logits: Tensor = TokenBridge.forward(MODEL, tokens, labels, visible, positions, dropped=dropped, **rest)
        return logits

    torch.manual_seed(seed)
    with torch.no_grad(), mock.patch.object(MODEL, "forward", record):
        loss = generator_loss(MODEL, latents(seed), LABELS, **settings)
    return loss.item(), calls[0]


@given(st.integers(0, 10**6))
def test_loss_is_the_cross_entropy_of_masked_tokens(seed: int) -> None:
    loss, call = recorded_loss(seed)
    both = torch.cat([call["visible"], call["positions"]], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(L).expand(B, -1))
    assert math.ceil(0.7 * L) <= call["positions"].shape[1]
    tokens = MODEL.quantizer.encode(MODEL.to_sequence(latents(seed)))
    assert torch.equal(call["tokens"], tokens)
    with torch.no_grad():
        logits = MODEL(tokens, LABELS, call["visible"], call["positions"], dropped=call["dropped"])
    targets = take(tokens, call["positions"])[..., list(TINY["channel_order"])]
    by_hand = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean().item()
    assert loss == pytest.approx(by_hand, rel=1e-5)  # a float32 mean in another order


@given(st.integers(0, 10**6), st.integers(1, 2 * L))
def test_num_loss_positions_takes_some_of_the_masked(seed: int, count: int) -> None:
    every_loss, every = recorded_loss(seed)
    loss, call = recorded_loss(seed, num_loss_positions=count)
    assert torch.equal(call["visible"], every["visible"])  # the mask is the same, whatever is scored
    assert torch.equal(call["positions"], every["positions"][:, :count])
    if count >= every["positions"].shape[1]:
        assert loss == every_loss


def test_loss_of_some_positions_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator_module, "training_mask_count", lambda length, **_: 12)
    every, some = [], []
    for seed in range(100):
        every.append(recorded_loss(seed)[0])
        some.append(recorded_loss(seed, num_loss_positions=3)[0])
    difference = torch.tensor(some) - torch.tensor(every)
    # Four standard errors of the mean of 100 paired differences.
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(100)


def test_label_dropout_share() -> None:
    assert not recorded_loss(0, label_dropout=0.0)[1]["dropped"].any()
    assert recorded_loss(0, label_dropout=1.0)[1]["dropped"].all()
    shares = torch.stack([recorded_loss(seed, label_dropout=0.3)[1]["dropped"] for seed in range(200)]).float()
    assert shares.mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 600))  # four standard errors


def test_initial_loss_is_about_log_levels() -> None:
    losses = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = TokenBridge(**{**TINY, "head_width": 128}).eval()
        with torch.no_grad():
            losses.append(generator_loss(model, latents(seed, batch=16), torch.arange(16) % 5).item())
    # Xavier's output layer gives normalised features (width W) logits of variance 2 W / (W + V); as guesses
    # that know nothing they cost about half of it over log V. Over seeds the loss spreads by 0.17: four
    # standard errors of four seeds are 0.35.
    assert sum(losses) / 4 == pytest.approx(math.log(V) + 128 / (128 + V), abs=0.35)


@pytest.mark.parametrize("head_type", ["ar", "parallel"])
def test_gradient_reaches_every_parameter(monkeypatch: pytest.MonkeyPatch, head_type: str) -> None:
    monkeypatch.setattr(generator_module, "training_mask_count", lambda length, **_: 12)  # so that some are visible
    model = tiny_model(head_type=head_type)
    torch.manual_seed(0)
    generator_loss(model, latents(0, batch=8), torch.arange(8) % 5, label_dropout=0.5).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_few_steps_lower_the_loss() -> None:
    torch.manual_seed(0)
    model = TokenBridge(**TINY).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = generator_loss(model, latents(0), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.2


# Saving


@pytest.mark.parametrize("head_type", ["ar", "parallel"])
@torch.no_grad()
def test_saving_and_loading_changes_nothing(tmp_path: Path, head_type: str) -> None:
    model = tiny_model(head_type=head_type, num_levels=16, value_range=4.0, num_sigmas=2.5)
    model.save_pretrained(tmp_path)
    loaded = TokenBridge.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, TokenBridge)
    assert loaded.channel_order == model.channel_order
    assert loaded.inverse_channel_order == model.inverse_channel_order
    assert {name for name in loaded.config if not name.startswith("_")} == {
        name for name in model.config if not name.startswith("_")
    }
    x = latents(0)
    tokens = model.quantizer.encode(model.to_sequence(x))
    assert torch.equal(loaded.quantizer.encode(loaded.to_sequence(x)), tokens)
    assert torch.equal(loaded.to_latents(tokens), model.to_latents(tokens))
    _, visible, masked = scene(0, 5)
    expected = model(tokens, LABELS, visible, masked)
    assert torch.equal(loaded(tokens, LABELS, visible, masked), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_saving_and_loading_keeps_another_quantiser(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = tiny_model()
    x = latents(0)
    model.quantizer = lloyd_max_quantizer(x, V)
    model.save_pretrained(tmp_path)
    loaded = TokenBridge.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded.quantizer.codebook, model.quantizer.codebook)
    assert torch.equal(loaded.quantizer.encode(x), model.quantizer.encode(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_order": (0, 0, 1, 2)}, "not a permutation"),
        ({"channel_order": (0, 1, 2)}, "has 3 entries for 4 channels"),
        ({"num_channels": 16}, "has 4 entries for 16 channels"),
        ({"head_type": "other"}, r"Unknown head 'other'; there are ar, parallel"),
        ({"num_levels": 741}, "741 levels are too many"),
        ({"num_levels": 1}, "at least 2 levels, not 1"),
        ({"value_range": -1.0}, "value_range must be positive"),
        ({"num_heads": 3}, "Width 32 is not divisible by 3 heads"),
        ({"head_num_heads": 5}, "Width 32 is not divisible by 5 heads"),
    ],
)
def test_bad_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBridge(**{**TINY, **changes})


# Golden


def golden_features(golden: Golden, model: TokenBridge, *, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Compute what the features case holds."""
    visible, _ = golden.visible_and_masked()
    tokens = model.quantizer.encode(model.to_sequence(golden.inputs["latents"]))
    embedding = model.backbone.embed_class(golden.inputs["labels"] if labels is None else labels)
    encoded = model.backbone.encode(model.quantizer.lookup(take(tokens, visible)), visible, embedding)
    return {"tokens": tokens, "encoder": encoded, "z": model.backbone.decode(encoded, visible)}


@torch.no_grad()
def test_golden_features() -> None:
    golden = load_golden("features")
    model = golden.model()
    ours = golden_features(golden, model)
    assert torch.equal(ours["tokens"], golden.outputs["tokens"])
    assert golden.close("encoder", ours["encoder"])
    assert golden.close("z", ours["z"])
    visible, _ = golden.visible_and_masked()
    z = model.context(golden.outputs["tokens"], visible, golden.inputs["labels"])
    assert golden.close("z", z)


def zero(path: str) -> Callable[[TokenBridge], None]:
    def mutate(model: TokenBridge) -> None:
        model.get_parameter(path).zero_()

    return mutate


FEATURE_MUTATIONS = {
    "no encoder positions": zero("backbone.encoder_pos_embed_learned"),
    "no decoder positions": zero("backbone.decoder_pos_embed_learned"),
    "no output positions": zero("backbone.output_pos_embed"),
    "no mask token": zero("backbone.mask_token"),
}


@pytest.mark.parametrize("mutation", list(FEATURE_MUTATIONS))
@torch.no_grad()
def test_golden_features_fail_for(mutation: str) -> None:
    golden = load_golden("features")
    model = golden.model()
    FEATURE_MUTATIONS[mutation](model)
    assert not golden.close("z", golden_features(golden, model)["z"])


@torch.no_grad()
def test_golden_features_fail_for_other_inputs() -> None:
    golden = load_golden("features")
    model = golden.model()
    other = golden_features(golden, model, labels=(golden.inputs["labels"] + 1) % 10)
    assert not golden.close("encoder", other["encoder"])
    assert not golden.close("z", other["z"])
    # Continuous instead of de-quantised latents, as MAR feeds them.
    visible, _ = golden.visible_and_masked()
    continuous = take(model.to_sequence(golden.inputs["latents"]), visible)
    embedding = model.backbone.embed_class(golden.inputs["labels"])
    assert not golden.close("encoder", model.backbone.encode(continuous, visible, embedding))


@torch.no_grad()
def test_golden_training_logits_and_loss() -> None:
    golden = load_golden("training-logits")
    model = golden.model()
    visible, masked = golden.visible_and_masked()
    tokens = model.quantizer.encode(model.to_sequence(golden.inputs["latents"]))
    logits = model(tokens, golden.inputs["labels"], visible, masked).flatten(0, 1)
    targets = take(tokens, masked)[..., list(model.channel_order)].flatten(0, 1)
    assert golden.close("logits", logits)
    assert torch.equal(targets, golden.outputs["targets"])
    assert golden.close("loss", F.cross_entropy(logits.flatten(0, 1), targets.flatten()))

    # Mutations: the sampler's first element; dropped labels; another channel order.
    labels = golden.inputs["labels"]
    sampling = model(tokens, labels, visible, masked, first="official").flatten(0, 1)
    assert not golden.close("logits", sampling)
    dropped = model(tokens, labels, visible, masked, dropped=torch.ones(3, dtype=torch.bool)).flatten(0, 1)
    assert not golden.close("logits", dropped)
    model.channel_order = model.channel_order[::-1]
    backwards = model(tokens, labels, visible, masked).flatten(0, 1)
    assert not golden.close("logits", backwards)
    assert not golden.close("loss", F.cross_entropy(backwards.flatten(0, 1), targets.flatten()))
