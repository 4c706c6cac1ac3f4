"""LlamaGen's golden cases: each fails when what it is there for is changed. Plain runs are in test_conformance.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDENS
from golden_cases import Arrays, changed, failed, golden, only_failure, set_meta
from official_names import layout, load_official, rule_state
from torch import Tensor

from tokenbridge.conformance import golden as g
from tokenbridge.conformance import judge as c
from tokenbridge.conformance import llamagen as gl
from tokenbridge.models.llamagen import model as llamagen
from tokenbridge.models.llamagen import sampling as llamagen_sampling
from tokenbridge.tokenizers import llamagen_vq
from tokenbridge.weights import rule

CASES = ["greedy", "greedy-interval", "logits", "topk-topp", "vq"]


def test_cases_are_here() -> None:
    assert sorted(path.stem for path in GOLDENS.glob("llamagen-*.npz")) == [f"llamagen-{name}" for name in CASES]
    used = {g.read_golden(golden(f"llamagen-{name}")).meta["entry"] for name in CASES}
    assert used == set(gl.ENTRIES["llamagen"])


@pytest.mark.parametrize(
    ("name", "first", "second", "outputs"),
    [
        ("logits", "layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w3.weight", {"logits", "logits_null"}),
        ("logits", "layers.1.attention_norm.weight", "layers.1.ffn_norm.weight", {"logits", "logits_null"}),
        ("greedy", "layers.0.attention.wo.weight", "layers.2.attention.wo.weight", {"logits"}),
        ("vq", "encoder.conv_blocks.2.attn.0.q.weight", "encoder.conv_blocks.2.attn.0.v.weight", {"z"}),
        ("vq", "decoder.mid.0.conv1.weight", "decoder.mid.2.conv1.weight", {"decoded", "forward"}),
    ],
)
def test_two_tensors_that_change_places_are_noticed(
    name: str, first: str, second: str, outputs: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = rule.rule_state

    def swapped(*arguments: Any) -> dict[str, Tensor]:
        state = original(*arguments)
        assert state[first].shape == state[second].shape
        return {**state, first: state[second], second: state[first]}

    monkeypatch.setattr("tokenbridge.conformance.golden.rule_state", swapped)
    assert outputs <= failed(c.run_file(golden(f"llamagen-{name}")))


def test_the_class_tokens_zero_row_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = llamagen.rotary_table

    def no_rotation(*arguments: Any, **options: Any) -> Tensor:
        table = original(*arguments, **options)
        table[0, :, 0] = 1.0
        return table

    monkeypatch.setattr(llamagen, "rotary_table", no_rotation)
    assert failed(c.run_file(golden("llamagen-logits"))) >= {"logits", "logits_null"}
    assert "logits" in failed(c.run_file(golden("llamagen-greedy")))


def test_which_half_turns_with_the_row_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = llamagen.rotary_table
    monkeypatch.setattr(llamagen, "rotary_table", lambda *a, **o: original(*a, **o).roll(4, dims=1))
    assert "logits" in failed(c.run_file(golden("llamagen-logits")))


@pytest.mark.parametrize(
    ("name", "keys", "value", "outputs"),
    [
        ("greedy", ("arguments", "cfg_scale"), 2.1, {"logits"}),
        ("greedy", ("arguments", "cfg_scale"), 1.0, {"logits", "tokens"}),
        ("greedy", ("arguments", "cfg_interval"), 5, {"logits"}),
        ("greedy-interval", ("arguments", "cfg_interval"), 4, {"logits"}),
        ("greedy-interval", ("arguments", "cfg_interval"), 6, {"logits"}),
        ("greedy-interval", ("arguments", "cfg_interval"), -1, {"logits"}),
        ("logits", ("config", "norm_eps"), 1e-2, {"logits"}),
        ("logits", ("config", "rope_base"), 100, {"logits"}),
        ("logits", ("config", "n_head"), 2, {"logits"}),
        ("logits", ("config", "cls_token_num"), 2, {"logits"}),
        ("logits", ("config", "n_kv_head"), 2, {"logits"}),
        ("logits", ("config", "ffn_dim_multiplier"), 2.0, {"logits"}),
        ("logits", ("config", "multiple_of"), 64, {"logits"}),
        ("vq", ("config", "codebook_l2_norm"), False, {"indices", "quantized", "codebook_entry", "decoded", "forward"}),
    ],
)
def test_arguments_and_configurations_are_followed(
    name: str, keys: tuple[str, ...], value: Any, outputs: set[str], tmp_path: Path
) -> None:
    assert outputs <= failed(c.run_file(changed(f"llamagen-{name}", tmp_path, set_meta(*keys, to=value))))


@pytest.mark.parametrize("interval", [5.5, 5.999])
def test_a_fraction_of_a_step_guides_no_further(interval: float, tmp_path: Path) -> None:
    path = changed("llamagen-greedy-interval", tmp_path, set_meta("arguments", "cfg_interval", to=interval))
    assert failed(c.run_file(path)) == set()


@pytest.mark.parametrize(
    "argument",
    [("temperature", 0.3), ("top_k", 3), ("top_p", 0.2), ("cfg_interval", -2)],
)
def test_what_leaves_the_most_likely_token_alone(argument: tuple[str, float], tmp_path: Path) -> None:
    """Logits are taken before temperature and filters; intervals up to -1 guide all tokens."""
    path = changed("llamagen-greedy", tmp_path, set_meta("arguments", argument[0], to=argument[1]))
    assert failed(c.run_file(path)) == set()


def test_fewer_tokens(tmp_path: Path) -> None:
    def change(meta: dict[str, Any], arrays: Arrays) -> None:
        meta["arguments"]["max_new_tokens"] = 7
        arrays["out.tokens"], arrays["out.logits"] = arrays["out.tokens"][:, :7], arrays["out.logits"][:, :7]

    assert failed(c.run_file(changed("llamagen-greedy", tmp_path, change))) == set()


def strict_ties(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Keep exactly k: of tied tokens the first."""
    if top_k > 0:
        places = logits.topk(min(top_k, logits.shape[1])).indices
        logits = torch.full_like(logits, -torch.inf).scatter(1, places, logits.gather(1, places))
    return llamagen_sampling.filter_logits(logits, top_p=top_p)


def top_p_first(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    return llamagen_sampling.filter_logits(llamagen_sampling.filter_logits(logits, top_p=top_p), top_k=top_k)


def without_the_crossing(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Remove the token that passes the threshold as well."""
    logits = llamagen_sampling.filter_logits(logits, top_k=top_k)
    ordered, tokens = logits.sort(descending=True)
    removed = ordered.softmax(-1).cumsum(-1) > top_p
    removed[:, 0] = False
    return logits.masked_fill(removed.scatter(1, tokens, removed), -torch.inf)


@pytest.mark.parametrize(
    ("variant", "outputs"),
    [
        (strict_ties, {"tied_filtered_k3"}),
        (top_p_first, {"filtered_k12_p0.8"}),
        (without_the_crossing, {"filtered_k0_p0.7", "filtered_k12_p0.8", "filtered_k100_p0.35"}),
    ],
)
def test_other_filters_are_noticed(
    variant: Callable[..., Tensor], outputs: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gl, "filter_logits", variant)
    assert failed(c.run_file(golden("llamagen-topk-topp"))) == outputs


def test_padding_of_the_encoder_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = llamagen_vq.LlamaGenVQ.latents

    def flipped(vq: llamagen_vq.LlamaGenVQ, images: Tensor) -> Tensor:
        return original(vq, images.flip(-1)).flip(-1)

    monkeypatch.setattr(llamagen_vq.LlamaGenVQ, "latents", flipped)
    assert "z" in failed(c.run_file(golden("llamagen-vq")))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("logits", set_meta("config", "rope", to=True), "Unknown configuration keys: rope"),
        ("logits", set_meta("config", "model_type", to="t2i"), "'t2i' is not built here"),
        ("logits", set_meta("config", "block_size", to=15), "block_size 15 is not a square"),
        ("logits", set_meta("config", "preset", to="GPT-S"), "Unknown preset 'GPT-S'"),
        ("logits", set_meta("config", "class_dropout_prob", to=0.0), "no logits_null"),
        ("greedy", set_meta("config", "class_dropout_prob", to=0.0), "no guidance"),
        ("greedy", set_meta("arguments", "sample_logits", to=True), "random stream"),
        ("greedy", set_meta("arguments", "batch", to=4), "4 images; in.labels has 3"),
        ("greedy", set_meta("arguments", "beams", to=4), "Unknown arguments: beams"),
        ("topk-topp", set_meta("arguments", "combos", to=[[5, 1.0], [6, 1.0]]), "missing: out.filtered_k6_p1.0"),
        ("topk-topp", set_meta("arguments", "combos", to=[[5, 1.0]]), "Unknown arrays: out.filtered_k0_p0.7"),
        ("topk-topp", lambda meta, arrays: arrays.pop("in.tied_logits"), "missing: in.tied_logits"),
        ("topk-topp", lambda meta, arrays: arrays.pop("out.tied_filtered_k3"), "Unknown arrays: in.tied_logits"),
        ("topk-topp", lambda meta, arrays: arrays.update({"out.best": np.zeros(1)}), "Unknown arrays: out.best"),
        ("vq", set_meta("config", "ch", to=32), "Unknown configuration keys: ch"),
        ("vq", set_meta("config", "preset", to="VQ-32"), "Unknown preset 'VQ-32'"),
    ],
)
def test_cases_that_cannot_be_run_say_why(
    name: str, change: Callable[[dict[str, Any], Arrays], Any], reason: str, tmp_path: Path
) -> None:
    assert reason in only_failure(changed(f"llamagen-{name}", tmp_path, change))


def test_a_sampled_case_of_one_candidate_is_greedy(tmp_path: Path) -> None:
    def change(meta: dict[str, Any], arrays: Arrays) -> None:
        meta["arguments"].update(sample_logits=True, top_k=1)

    assert failed(c.run_file(changed("llamagen-greedy", tmp_path, change))) == set()


@pytest.mark.parametrize("name", ["GPT-L", "GPT_L"])
def test_a_preset_is_completed_by_the_constructors_defaults(name: str) -> None:
    config = gl.gpt_config({"preset": name, "block_size": 576, "resid_dropout_p": 0.3})
    assert (config["dim"], config["n_layer"], config["n_head"], config["block_size"]) == (1024, 24, 16, 576)
    model = gl.make_gpt(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 342_910_976
    assert model.device.type == "meta"
    assert gl.gpt_config({})["dim"] == 4096
    vq = gl.make_vq(gl.vq_config({"preset": "VQ-8", "z_channels": 256}))
    assert sum(parameter.numel() for parameter in vq.parameters()) == 70_109_835


def test_kv_heads_of_a_case_are_followed() -> None:
    """Checked against the official code when this was written; here: that groups share their head, in order."""
    config = gl.gpt_config({"vocab_size": 16, "block_size": 4, "dim": 32, "n_layer": 1, "n_head": 4, "n_kv_head": 2})
    model = gl.make_gpt(config)
    assert layout(model).mappings["layers.0.attention.wqkv.weight"].shape == (64, 32)
    full = gl.make_gpt(config | {"n_kv_head": 4})
    state = rule_state(model, {"rule": "fan-in-normal-v1", "salt": "kv"})
    q, k, v = state["layers.0.attention.wqkv.weight"].split([32, 16, 16])
    repeated = [part.view(2, 8, 32).repeat_interleave(2, dim=0).flatten(0, 1) for part in (k, v)]
    load_official(model, state)
    load_official(full, state | {"layers.0.attention.wqkv.weight": torch.cat([q, *repeated])})
    tokens, labels = torch.tensor([[3, 1, 2]]), torch.tensor([7])
    torch.testing.assert_close(model(tokens, labels), full(tokens, labels), atol=1e-5, rtol=1e-5)
    assert F.mse_loss(model(tokens, labels), model(tokens, labels + 1)) > 1e-3
