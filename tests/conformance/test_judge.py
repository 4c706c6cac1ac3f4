"""The conformance runner: the golden files pass, and every kind of change to one fails with its reason."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import Arrays, changed, failed, golden, listed_goldens, only_failure, set_meta
from official_names import layout, rule_state
from torch import Tensor

from tokenbridge.conformance import judge as c
from tokenbridge.conformance import tokenbridge as gt
from tokenbridge.models.tokenbridge.heads import ARHead, FirstElement
from tokenbridge.utils.errors import MissingFileError, UserError
from tokenbridge.utils.files import reference_folder, sha256_of
from tokenbridge.weights import rule

SYSTEMS = ("tokenbridge-", "kl16-")  # the baselines' cases are in tests of their own
GOLDENS = sorted(p for p in (reference_folder() / "goldens").glob("*.npz") if p.name.startswith(SYSTEMS))
NAMES = [path.stem for path in GOLDENS]
SALT = {"rule": "fan-in-normal-v1", "salt": "test"}


def test_all_public_cases_are_here() -> None:
    ours = {path.name: sha256_of(path) for path in (reference_folder() / "goldens").glob("*.npz")}
    assert {name.split("-")[0] for name in ours} == set(c.ENTRIES)
    assert ours == listed_goldens()


@pytest.mark.parametrize("path", GOLDENS, ids=NAMES)
def test_golden(path: Path) -> None:
    outcomes = c.run_file(path)
    assert [outcome for outcome in outcomes if outcome.verdict != "pass"] == []
    with np.load(path) as file:
        assert {outcome.name for outcome in outcomes} == {key[4:] for key in file.files if key.startswith("out.")}
    # Far inside the case's tolerance: float32 sums in another order.
    assert all(outcome.error is not None and outcome.error < 5e-5 for outcome in outcomes)


@pytest.mark.parametrize(
    ("name", "output"),
    [
        (path.stem, key[4:])
        for path in GOLDENS
        for key in np.load(path).files
        if key.startswith("out.") and not path.stem.endswith(("-8", "-uncond"))
    ],
)
def test_a_changed_value_fails_its_output_alone(name: str, output: str, tmp_path: Path) -> None:
    def change(meta: dict[str, Any], arrays: Arrays) -> None:
        array = arrays[f"out.{output}"].copy()
        share = slice(None, max(1, array.size // 50))  # 2 %: more than the 1 % that sampled tokens may differ by
        part = array.reshape(-1)[share]  # a view; what was filtered out is -inf, and stays so if added to
        part[:] = np.where(np.isfinite(part), part, 0)
        part += 1 if np.issubdtype(array.dtype, np.integer) else np.float32(0.01)
        arrays[f"out.{output}"] = array

    outcomes = c.run_file(changed(name, tmp_path, change))
    assert failed(outcomes) == {output}
    assert all(outcome.reason for outcome in outcomes if outcome.verdict == "fail")


def test_the_salt_decides(tmp_path: Path) -> None:
    """The control of the weights: another salt, other numbers."""
    path = changed("tokenbridge-features", tmp_path, set_meta("weights", "salt", to="other"))
    assert failed(c.run_file(path)) == {"encoder", "z"}


@pytest.mark.parametrize(
    ("name", "first", "second", "outputs"),
    [
        ("tokenbridge-features", "decoder_blocks.0.norm1.weight", "decoder_blocks.0.norm2.weight", {"z"}),
        (
            "tokenbridge-features",
            "encoder_blocks.0.mlp.fc1.weight",
            "encoder_blocks.1.mlp.fc1.weight",
            {"encoder", "z"},
        ),
        ("tokenbridge-head-sampling-logits", "channel_heads.3.bias", "channel_heads.4.bias", {"logits"}),
        ("kl16-vae", "encoder.down.4.attn.0.q.weight", "encoder.down.4.attn.0.k.weight", {"mean", "logvar", "decoded"}),
        ("kl16-vae", "decoder.up.0.block.1.conv1.weight", "decoder.up.0.block.2.conv1.weight", {"decoded"}),
    ],
)
def test_two_tensors_that_change_places_are_noticed(
    name: str, first: str, second: str, outputs: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the mapping of names: shapes cannot tell these apart, the numbers do."""
    original = rule.rule_state

    def swapped(*arguments: Any) -> dict[str, Tensor]:
        state = original(*arguments)
        assert state[first].shape == state[second].shape
        return {**state, first: state[second], second: state[first]}

    monkeypatch.setattr("tokenbridge.conformance.golden.rule_state", swapped)
    assert failed(c.run_file(golden(name))) == outputs


@pytest.mark.parametrize(
    ("name", "first", "output"),
    [
        ("tokenbridge-head-sampling-logits", "training-consistent", "logits"),
        ("tokenbridge-training-logits", "official", "logits"),
    ],
)
def test_the_other_first_element_is_noticed(
    name: str, first: FirstElement, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ARHead._first

    def other(self: ARHead, context: Tensor, condition: Tensor, _: FirstElement) -> Tensor:
        return original(self, context, condition, first)

    monkeypatch.setattr(ARHead, "_first", other)
    assert output in failed(c.run_file(golden(name)))


def nearly_nothing(meta: dict[str, Any], arrays: Arrays) -> None:
    """Outputs that are far smaller than the tolerance."""
    meta["tolerance"] = {"atol": 1.0, "rtol": 0}
    for name in arrays:
        if name.startswith("out."):
            arrays[name] = arrays[name] * np.float32(1e-6)


def test_what_unfolds_to_too_much_is_not_unfolded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenbridge.conformance.golden.LARGEST", 10_000)
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was unfolded"))
    assert "unfold to" in only_failure(golden("tokenbridge-features"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_meta("format", to=2), "Format version 2 is unknown"),
        (set_meta("system", to="var"), "System 'var' is unknown"),
        (set_meta("entry", to="speed"), "Entry 'speed' of tokenbridge is unknown"),
        (set_meta("config", "rope", to=True), "Unknown configuration keys: rope"),
        (set_meta("config", "preset", to="tokenbridge_giant"), "Unknown preset 'tokenbridge_giant'"),
        (set_meta("config", "preset", to="tokenbridge-tiny"), "not a preset of the official code"),
        (set_meta("config", "encoder_num_heads", to=5), "not divisible by 5 heads"),
        (set_meta("config", "img_size", to=128), r"in\.latents has the shape \[3, 16, 4, 4\]"),
        (lambda meta, arrays: arrays.update({"in.mask": arrays["in.mask"][:, :9]}), r"in\.mask has the shape"),
        (set_meta("arguments", "cfg", to=2.0), "Unknown arguments: cfg"),
        (set_meta("weights", "rule", to="zeros-v1"), "rule for weights"),
        (set_meta("weights", to={"rule": "fan-in-normal-v1"}), "rule for weights"),
        (set_meta("tolerance", to={"atol": 1e-4}), "lacks atol or rtol"),
        (set_meta("tolerance", to={"atol": float("inf"), "rtol": 0}), "lacks atol or rtol"),
        (set_meta("tolerance", to={"atol": 1e300, "rtol": 0}), "is too large"),
        (set_meta("tolerance", to={"atol": 0, "rtol": 1e9}), "is too large"),
        (set_meta("tolerance", to={"atol": float("nan"), "rtol": 0}), "lacks atol or rtol"),
        (nearly_nothing, "zeros would pass too"),
        (set_meta("tolerance", "pixels", to="equal"), "unknown outputs: pixels"),
        (lambda meta, arrays: arrays.update({"out.z": arrays["out.z"] * (1 + 1j)}), r"not out\.z of complex"),
        (lambda meta, arrays: arrays.update({"out.z": arrays["out.z"].astype(str)}), r"not out\.z of <U"),
        (lambda meta, arrays: meta.pop("weights"), "'meta' lacks weights"),
        (lambda meta, arrays: arrays.pop("out.z"), r"missing: out\.z"),
        (lambda meta, arrays: arrays.pop("in.labels"), r"missing: in\.labels"),
        (lambda meta, arrays: arrays.update({"in.more": np.zeros(1)}), r"Unknown arrays: in\.more"),
        (lambda meta, arrays: arrays.update({"more": np.zeros(1)}), "Unknown array 'more'"),
        (lambda meta, arrays: arrays.update({"out.z": np.zeros((0, 2))}), "nothing to compare"),
        (lambda meta, arrays: arrays["in.mask"].__setitem__((0, slice(None)), 1), "different numbers of positions"),
        (lambda meta, arrays: arrays["in.labels"].__setitem__(0, 99), "IndexError"),
        (lambda meta, arrays: arrays["in.latents"].__setitem__((0, 0), np.nan), "NaN or infinite"),
    ],
)
def test_what_cannot_be_run_is_a_failure_with_its_reason(
    change: Callable[[dict[str, Any], Arrays], Any], reason: str, tmp_path: Path
) -> None:
    given = only_failure(changed("tokenbridge-features", tmp_path, change))
    assert given
    assert re.search(reason, given)


def test_damaged_files(tmp_path: Path) -> None:
    content = golden("tokenbridge-features").read_bytes()
    damaged = tmp_path / "damaged.npz"
    for kept in (0, 100, len(content) // 2, len(content) - 10):
        damaged.write_bytes(content[:kept])
        assert "damaged" in only_failure(damaged)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    damaged.write_bytes(flipped)
    assert "damaged" in only_failure(damaged)
    with pytest.raises(MissingFileError, match="There is no golden file or folder"):
        c.run_files([tmp_path / "absent.npz"])
    np.savez(damaged, x=np.zeros(1))
    assert "no 'meta'" in only_failure(damaged)
    np.savez(damaged, meta=np.array("{"))
    assert "JSONDecodeError" in only_failure(damaged)
    np.savez(damaged, meta=np.array([print], dtype=object))
    assert "damaged or not an .npz file" in only_failure(damaged)  # objects are pickled: never loaded


def test_shapes_and_nan(tmp_path: Path) -> None:
    def cut(meta: dict[str, Any], arrays: Arrays) -> None:
        arrays["out.z"] = arrays["out.z"][:1]
        arrays["out.encoder"] = np.full_like(arrays["out.encoder"], np.nan)

    outcomes = {outcome.name: outcome for outcome in c.run_file(changed("tokenbridge-features", tmp_path, cut))}
    assert outcomes["z"].reason == "shape [3, 16, 64] instead of [1, 16, 64]"
    assert outcomes["encoder"].verdict == "fail"
    assert "NaN" in outcomes["encoder"].reason
    assert outcomes["encoder"].error is None  # so that the JSON stays JSON
    assert outcomes["tokens"].verdict == "pass"


# ------------------------------------------------------------------------------- tolerances in words


def move_to_midpoint(distance: float) -> Callable[[dict[str, Any], Arrays], None]:
    """Put one value `distance` above the midpoint of levels 3 and 4, and claim the lower index for it."""

    def change(meta: dict[str, Any], arrays: Arrays) -> None:
        quantizer = gt.make_quantizer(gt.tokenbridge_config(meta["config"]))
        arrays["in.x"][100] = quantizer.midpoints[3].item() + distance
        arrays["out.indices"][100] = 3
        arrays["out.dequantized"][100] = quantizer.codebook[3].item()

    return change


def test_an_index_may_differ_on_a_midpoint_only(tmp_path: Path) -> None:
    near = {o.name: o for o in c.run_file(changed("tokenbridge-quantizer-8", tmp_path, move_to_midpoint(5e-6)))}
    assert {name for name, outcome in near.items() if outcome.verdict == "fail"} == set()
    assert near["indices"].reason == "1 of 4096 differ"
    assert near["dequantized"].error == 0  # judged where the index agrees
    assert failed(c.run_file(changed("tokenbridge-quantizer-8", tmp_path, move_to_midpoint(1e-3)))) == {"indices"}


@pytest.mark.parametrize(("num_changed", "fails"), [(7, set()), (8, {"tokens"})])
def test_99_percent_of_the_tokens(num_changed: int, fails: set[str], tmp_path: Path) -> None:
    """There are 768 tokens: 7 are 0.9 %, 8 are 1.04 %. Latents are judged where the tokens agree."""

    def change(meta: dict[str, Any], arrays: Arrays) -> None:
        tokens, latents = arrays["out.tokens"], arrays["out.latents"]
        tokens[0, :num_changed, 5] += 1
        latents.reshape(3, 16, 16)[0, 5, :num_changed] += 0.5

    assert failed(c.run_file(changed("tokenbridge-sample-cfg1", tmp_path, change))) == fails


def test_words_that_are_not_understood_fail(tmp_path: Path) -> None:
    outcomes = c.run_file(
        changed("tokenbridge-sample-cfg1", tmp_path, set_meta("tolerance", "tokens", to="about right"))
    )
    assert failed(outcomes) == {"tokens"}
    assert "not understood" in next(o.reason for o in outcomes if o.name == "tokens")


def test_sampling_at_a_temperature_needs_a_stream_that_is_not_there(tmp_path: Path) -> None:
    path = changed("tokenbridge-sample-cfg1", tmp_path, set_meta("arguments", "temperature", to=1.0))
    assert "random stream" in only_failure(path)


def test_the_schedule_of_guidance_is_followed(tmp_path: Path) -> None:
    path = changed("tokenbridge-sample-cfg3-linear", tmp_path, set_meta("arguments", "cfg_schedule", to="constant"))
    assert "tokens" in failed(c.run_file(path))


# -------------------------------------------------------------------------------------- configurations


def test_a_preset_is_completed_by_the_constructors_defaults() -> None:
    config = gt.tokenbridge_config({"preset": "tokenbridge_huge", "class_num": 10, "proj_dropout": 0.3})
    assert config["decoder_embed_dim"] == 1280
    assert config["channel_embed_dim"] == 1024
    assert config["channel_depth"] == 6
    assert config["norm_layer_eps"] == 1e-6
    assert config["quant_levels"] == 32  # the constructor's default; the published models were given 64
    assert config["class_num"] == 10
    assert gt.tokenbridge_config({"preset": "tokenbridge_base", "norm_layer_eps": 1e-5})["norm_layer_eps"] == 1e-5
    bare = gt.tokenbridge_config({})
    assert (bare["channel_embed_dim"], bare["norm_layer_eps"]) == (256, 1e-5)


def test_a_full_size_preset_is_built_without_memory() -> None:
    config = gt.tokenbridge_config({"preset": "tokenbridge_large", "quant_levels": 64})
    model = gt.make_model(config)
    assert sum(p.numel() for p in model.parameters()) == 486_889_472
    assert model.device.type == "meta"
    parts = {**layout(gt.make_backbone(config)).mappings, **layout(gt.make_head(config)).mappings}
    whole = layout(model).mappings
    assert {name: mapping.shape for name, mapping in parts.items()} == {name: m.shape for name, m in whole.items()}


ASYMMETRIC: dict[str, Any] = {
    "img_size": 64,
    "encoder_embed_dim": 24,
    "encoder_depth": 1,
    "encoder_num_heads": 3,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 4,
    "channel_embed_dim": 16,
    "channel_depth": 1,
    "channel_heads": 2,
    "mlp_ratio": 2.5,
    "quant_levels": 8,
    "class_num": 3,
    "buffer_size": 2,
    "quant_min": -4.0,
    "quant_max": 6.0,
}


def test_encoder_and_decoder_of_different_widths() -> None:
    """Checked against the official code when this was written; here: sizes, and that everything runs."""
    model = gt.make_model(gt.tokenbridge_config(ASYMMETRIC))
    shapes = {name: mapping.shape for name, mapping in layout(model).mappings.items()}
    assert shapes["decoder_embed.weight"] == (32, 24)
    assert shapes["fake_latent"] == (1, 24)
    assert shapes["condition_proj.weight"] == (16, 32)
    assert shapes["encoder_blocks.0.mlp.fc1.weight"] == (60, 24)
    assert shapes["channel_blocks.0.mlp.fc1.weight"] == (40, 16)


def test_a_range_that_is_not_symmetric() -> None:
    quantizer = gt.make_quantizer(gt.tokenbridge_config(ASYMMETRIC))
    assert quantizer.codebook.mean().item() == pytest.approx(1.0, abs=1e-5)
    span = (quantizer.codebook[-1] - quantizer.codebook[0]).item()
    symmetric = gt.make_quantizer(gt.tokenbridge_config({"quant_levels": 8})).codebook
    assert span == pytest.approx((symmetric[-1] - symmetric[0]).item(), abs=1e-5)


def test_orders_that_are_no_permutations(tmp_path: Path) -> None:
    def change(meta: dict[str, Any], arrays: Arrays) -> None:
        arrays["in.orders"][0, 0] = arrays["in.orders"][0, 1]

    assert "permutations" in only_failure(changed("tokenbridge-sample-cfg1", tmp_path, change))


def test_patches_are_channels_then_rows_then_columns() -> None:
    latents = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).float()
    patches = gt._patches(latents, {"patch_size": 2})
    assert patches.shape == (2, 4, 12)
    assert patches[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23, 34, 35, 38, 39]


@pytest.mark.parametrize("change", [{"vae_embed_dim": 8}, {"patch_size": 2}, {"patch_size": 2, "vae_embed_dim": 4}])
def test_configs_that_the_official_code_cannot_sample_fail_with_the_reason(
    change: dict[str, int], tmp_path: Path
) -> None:
    def other(meta: dict[str, Any], arrays: Arrays) -> None:
        meta["config"].update(change)

    assert "channel order is a constant" in only_failure(changed("tokenbridge-sample-cfg1", tmp_path, other))


def test_too_many_levels(tmp_path: Path) -> None:
    path = changed("tokenbridge-quantizer-8", tmp_path, set_meta("config", "quant_levels", to=1024))
    assert "1024 levels are too many" in only_failure(path)


def test_the_rule() -> None:
    """Numbers computed by hand from the text of reference_results/goldens/README.md."""
    state = rule_state(gt.make_head(gt.tokenbridge_config(ASYMMETRIC)), SALT)
    for name, shape in (
        ("condition_proj.weight", (16, 32)),
        ("channel_norm.weight", (16,)),
        ("channel_norm.bias", (16,)),
        ("channel_embed", (1, 16, 16)),
    ):
        x = np.random.RandomState(zlib.crc32(f"test/{name}".encode())).standard_normal(shape)
        scaled = x / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1 * x + name.endswith("weight")
        assert state[name].dtype == torch.float32
        np.testing.assert_allclose(state[name].numpy(), scaled, rtol=1e-5, atol=1e-7)


# --------------------------------------------------------------------------------------------- command


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = golden("tokenbridge-quantizer-8"), tmp_path / "bad.npz"
    bad.write_bytes(b"")
    assert c.conformance([good])
    out = capsys.readouterr()
    assert "1 of 1 files pass." in out.out
    assert "reconstruction_values" in out.out
    assert "quantizer-8" in out.err  # progress
    assert not c.conformance([good, bad], as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert [file["passed"] for file in report["files"]] == [True, False]
    assert report["passed"] is False
    assert report["files"][1]["outcomes"][0]["reason"]


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There are no golden files"):  # nothing in it is no success
        c.run_files([tmp_path])
    (tmp_path / "one.npz").write_bytes(golden("tokenbridge-quantizer-8").read_bytes())
    assert [Path(report.path).name for report in c.run_files([tmp_path])] == ["one.npz"]
    assert not c.conformance([])
