"""The benchmarks' reference path: equal to the official code's numbers, and not by chance."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor
from waits import Waits

from benchmarks import make_golden as m
from benchmarks.reference import Reference, make_reference
from tokenbridge.conformance.golden import Golden, read_golden
from tokenbridge.conformance.judge import run_file
from tokenbridge.conformance.tokenbridge import tokenbridge_config
from tokenbridge.utils.files import reference_folder

ENTRIES = ("features", "training-logits", "head-sampling-logits", "sample-cfg1", "sample-cfg3-linear", "sample-uncond")


def read(name: str) -> Golden:
    return read_golden(reference_folder() / "goldens" / f"tokenbridge-{name}.npz")


def reference(golden: Golden) -> Reference:
    return m.rule_reference(golden.meta["config"], golden.meta["weights"])


@torch.inference_mode()
def agrees(golden: Golden, path: Reference, **arguments: Any) -> bool:
    """Tell whether every output is within the case's tolerance; integers must be equal."""
    inputs = {name: golden.tensor(name) for name in golden.inputs}
    outputs = m.ENTRIES[golden.meta["entry"]](path, inputs, {**golden.meta["arguments"], **arguments})
    assert set(outputs) == set(golden.outputs)
    tolerance = {key: golden.meta["tolerance"][key] for key in ("atol", "rtol")}
    for name, theirs in golden.outputs.items():
        ours = outputs[name].numpy()
        close = np.array_equal if np.issubdtype(theirs.dtype, np.integer) else np.allclose
        if not (ours.shape == theirs.shape and close(ours, theirs, **(tolerance if close is np.allclose else {}))):
            return False
    return True


@pytest.mark.parametrize("name", ENTRIES)
def test_golden(name: str) -> None:
    golden = read(name)
    assert agrees(golden, reference(golden))


def test_quantiser_golden() -> None:
    golden = read("quantizer-64")
    config = tokenbridge_config(golden.meta["config"])
    path = make_reference({"any": torch.zeros(())}, config)
    torch.testing.assert_close(path.values, torch.from_numpy(golden.outputs["reconstruction_values"]))
    tokens = path.encode(golden.tensor("x"))
    assert torch.equal(tokens, torch.from_numpy(golden.outputs["indices"]))
    torch.testing.assert_close(path.decode(tokens), torch.from_numpy(golden.outputs["dequantized"]))


# ------------------------------------------------------------------------------------------- mutations


class SecondPassWithClass(Reference):
    """Guidance whose unconditional pass has the class after all."""

    def class_embedding(self, labels: Tensor | None, batch: int) -> Tensor:
        return super().class_embedding(torch.full((batch,), 1) if labels is None else labels, batch)


class NoTimestep(Reference):
    """A head whose first element is that of the training."""

    def head(self, x: Tensor, condition: Tensor) -> Tensor:
        first = (x[:, :1] - self.weights["timesteps_embeddings"][:, :1]).expand(x.shape[0], -1, -1)
        return super().head(torch.cat([first, x[:, 1:]], dim=1), condition)


def no_mask(path: Reference) -> Reference:
    return replace(path, causal=torch.zeros_like(path.causal))


def other_eps(path: Reference) -> Reference:
    return replace(path, config={**path.config, "norm_layer_eps": 1e-2})


def other_order(path: Reference) -> Reference:
    return replace(path, channel_order=tuple(range(16)))


def without(name: str) -> Callable[[Reference], Reference]:
    def change(path: Reference) -> Reference:
        return replace(path, weights={**path.weights, name: torch.zeros_like(path.weights[name])})

    change.__name__ = f"without {name}"
    return change


def as_class(kind: type[Reference]) -> Callable[[Reference], Reference]:
    def change(path: Reference) -> Reference:
        return kind(path.weights, path.config, path.values, path.causal, path.channel_order)

    change.__name__ = kind.__name__
    return change


MUTATIONS = [
    ("features", other_eps),
    ("features", without("output_pos_embed")),
    ("training-logits", no_mask),
    ("training-logits", other_order),
    ("head-sampling-logits", as_class(NoTimestep)),
    ("head-sampling-logits", without("timesteps_embeddings")),
    ("sample-cfg1", other_order),
    ("sample-cfg3-linear", as_class(SecondPassWithClass)),
    ("sample-uncond", without("fake_latent")),
]


@pytest.mark.parametrize(("name", "change"), MUTATIONS, ids=[f"{n}-{c.__name__}" for n, c in MUTATIONS])
def test_golden_fails_for(name: str, change: Callable[[Reference], Reference]) -> None:
    golden = read(name)
    assert not agrees(golden, change(reference(golden)))


def test_the_reference_waits_for_the_device_in_every_iteration() -> None:
    """As the official sampler does; the package does not (test_sampling.py counts in the same way)."""
    golden = read("sample-cfg3-linear")
    path, inputs = reference(golden), {name: golden.tensor(name) for name in golden.inputs}
    counts = []
    for num_iter in (2, 8):
        with torch.inference_mode(), Waits() as waits:
            m.sample(path, inputs, {**golden.meta["arguments"], "num_iter": num_iter})
        counts.append(waits.count)
    assert counts[1] >= counts[0] + 6 * 2


@pytest.mark.parametrize("arguments", [{"cfg": 3.0}, {"cfg_schedule": "constant"}, {"num_iter": 5}])
def test_golden_sample_fails_for(arguments: dict[str, Any]) -> None:
    golden = read("sample-cfg3-linear")
    assert not agrees(golden, reference(golden), **arguments)


# ----------------------------------------------------------------------------------- goldens of our own

SMALL: dict[str, Any] = {
    "img_size": 96,
    "encoder_embed_dim": 48,
    "encoder_depth": 2,
    "encoder_num_heads": 3,
    "decoder_embed_dim": 64,
    "decoder_depth": 2,
    "decoder_num_heads": 4,
    "channel_embed_dim": 32,
    "channel_depth": 2,
    "channel_heads": 4,
    "quant_levels": 32,
    "class_num": 7,
    "buffer_size": 5,
    "norm_layer_eps": 1e-6,
}


def test_own_goldens_pass_and_a_changed_one_fails(tmp_path: Path) -> None:
    paths = m.write_goldens(tmp_path, "small", SMALL, num_iter=5, num_masked=20)
    assert [read_golden(path).meta["entry"] for path in paths] == list(m.ENTRIES)
    for path in paths:
        assert {outcome.verdict for outcome in run_file(path)} == {"pass"}
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
        meta = json.loads(str(arrays["meta"]))
        assert "NOT the official code" in meta["source"]
        meta["weights"]["salt"] = "another"
        np.savez(tmp_path / "changed.npz", **{**arrays, "meta": np.array(json.dumps(meta))})
        assert "fail" in {outcome.verdict for outcome in run_file(tmp_path / "changed.npz")}


def test_shipped_own_goldens_are_of_the_full_size() -> None:
    """They are run by `nox -s conformance_l`: 2 GB of weights each."""
    paths = sorted((ROOT / "reference_results" / "goldens-own").glob("*.npz"))
    assert {read_golden(path).meta["entry"] for path in paths} >= {"sample", "training-logits", "head-sampling-logits"}
    for path in paths:
        golden = read_golden(path)
        config = tokenbridge_config(golden.meta["config"])
        assert config["encoder_embed_dim"] == config["channel_embed_dim"] == 1024
        assert config["encoder_depth"] == config["decoder_depth"] == 16
        assert "NOT the official code" in golden.meta["source"]
