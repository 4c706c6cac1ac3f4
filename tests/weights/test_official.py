"""Published checkpoints: names, shapes, both directions, and files that are damaged, foreign or malicious."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from diffusers import AutoencoderKL
from official_files import (
    SMALL_VAE,
    Malicious,
    declare_small_models,
    empty_tiny,
    official_state,
    small_vae,
    write_checkpoint,
    write_kl16,
)
from official_names import from_official, layout, load_official, rule_state, to_official
from published import published_numbers, published_shapes
from torch import nn

from tokenbridge.models.masked import MaskedBackbone
from tokenbridge.models.tokenbridge.checkpoint import load_tokenbridge, official_buffers
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.models.tokenbridge.presets import PRESETS, create_model
from tokenbridge.sampling.convert import convert
from tokenbridge.tokenizers.kl16 import create_kl16, load_kl16
from tokenbridge.utils.errors import UserError
from tokenbridge.weights.published import find_preset
from tokenbridge.weights.torch_files import read_checkpoint

RULE = {"rule": "fan-in-normal-v1", "salt": "official"}
PUBLISHED = [name for name, preset in PRESETS.items() if preset.official_name]


# ------------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_names_shapes_and_counts(name: str) -> None:
    published = published_shapes(PRESETS[name].official_name)
    model = create_model(name)
    assert model.device.type == "meta"
    # The list was made with the official constructor without its quantiser's two buffers.
    state = {key: tuple(value.shape) for key, value in official_buffers(model).items() if key == "channel_mask"}
    state |= {key: mapping.shape for key, mapping in layout(model).mappings.items()}
    assert state == published
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].num_parameters


def test_kl16_has_the_published_names_shapes_and_count() -> None:
    vae = create_kl16()
    assert {key: mapping.shape for key, mapping in layout(vae).mappings.items()} == published_shapes("kl16")
    assert sum(p.numel() for p in vae.parameters()) == published_numbers()["counted"]["kl16_vae"]["total"]


def test_the_tiny_preset_is_the_tiny_recipe() -> None:
    model = create_model("tokenbridge-tiny")
    assert model.num_positions == 16
    assert PRESETS["tokenbridge-tiny"].sampling_config().num_iterations == 16


def test_sampling_settings_of_readme_and_paper() -> None:
    large, huge = PRESETS["tokenbridge-l"], PRESETS["tokenbridge-h"]
    settings = large.sampling_config()
    assert (settings.num_iterations, settings.guidance_scale, settings.temperature) == (256, 3.1, 0.96)
    assert settings.guidance_schedule == "linear"
    assert large.sampling_config("paper").temperature == 0.97
    assert huge.sampling_config().guidance_scale == 3.45
    assert huge.sampling_config() == huge.sampling_config("paper")
    with pytest.raises(ValueError, match="No sampling settings were published"):
        PRESETS["tokenbridge-b"].sampling_config()
    with pytest.raises(ValueError, match="no sampling settings 'article'"):
        large.sampling_config("article")


def test_presets_answer_to_their_official_names() -> None:
    assert find_preset("tokenbridge_large", PRESETS) is PRESETS["tokenbridge-l"]
    with pytest.raises(ValueError, match=r"Unknown preset 'tokenbridge-xl'.*tokenbridge-h"):
        create_model("tokenbridge-xl")


def test_a_wrong_parameter_count_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = PRESETS["tokenbridge-tiny"]
    monkeypatch.setitem(PRESETS, preset.name, type(preset)(preset.name, preset.model, preset.num_parameters + 1))
    with pytest.raises(AssertionError, match="not the expected"):
        create_model(preset.name)
    create_model(preset.name, head_depth=1)  # a model of another size has no count to meet


def test_a_model_of_the_meta_device_has_its_codebook() -> None:
    """The quantiser is no part of a checkpoint: it must be there before any weights are."""
    codebook = empty_tiny().quantizer.codebook
    assert codebook.device.type == "cpu"
    assert torch.equal(codebook, tiny_model().quantizer.codebook)


# -------------------------------------------------------------------------------------- both directions


def test_tokenbridge_round_trip() -> None:
    model, again = tiny_model(), empty_tiny()
    load_official(again, official_state(model))
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(p.requires_grad for p in again.parameters())


def test_kl16_round_trip() -> None:
    vae = create_kl16(**SMALL_VAE)
    state = rule_state(vae, RULE)
    load_official(vae, state)
    back = to_official(vae)
    assert back.keys() == state.keys()
    assert all(torch.equal(state[name], back[name]) for name in state)
    assert back["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)


def test_loading_takes_the_tensors_themselves() -> None:
    """No second copy of the model: parameters lie where the state's tensors lie."""
    model = empty_tiny()
    state = rule_state(model, RULE)
    load_official(model, state)
    pointers = {value.data_ptr() for value in state.values()}
    assert {p.data_ptr() for p in model.parameters()} == pointers


def test_parts_have_official_names() -> None:
    backbone = tiny_model().backbone
    assert isinstance(backbone, MaskedBackbone)
    assert "encoder_blocks.0.attn.qkv.weight" in layout(backbone).mappings


def test_buffers_may_be_absent_but_not_wrong() -> None:
    state, buffers = official_state(tiny_model()), layout(tiny_model()).buffers
    from_official(empty_tiny(), {name: value for name, value in state.items() if name not in buffers})
    for name in buffers:
        wrong = {**state, name: state[name].clone()}
        wrong[name].view(-1)[0] += 0.01
        with pytest.raises(ValueError, match=f"1 of another model: {name}"):
            from_official(empty_tiny(), wrong)
    rounded = state["reconstruction_values"] + 1e-5  # what another libm makes of erf and exp
    from_official(empty_tiny(), {**state, "reconstruction_values": rounded})


@pytest.mark.parametrize("kind", ["tokenbridge", "kl16"])
def test_strictness(kind: str) -> None:
    full: nn.Module = tiny_model() if kind == "tokenbridge" else small_vae()
    empty: nn.Module = empty_tiny() if kind == "tokenbridge" else create_kl16(**SMALL_VAE)
    state = official_state(full)
    names = list(layout(full).mappings)
    lacking = {name: value for name, value in state.items() if name not in names[3:10]}
    with pytest.raises(ValueError, match=rf"7 missing: {names[3]}, .* and 2 more"):
        from_official(empty, lacking)
    with pytest.raises(ValueError, match=r"1 left over: loss\.logvar"):
        from_official(empty, {**state, "loss.logvar": torch.zeros(())})
    with pytest.raises(ValueError, match=rf"1 of another shape: {names[0]} \[7\] instead of"):
        from_official(empty, {**state, names[0]: torch.zeros(7)})
    with pytest.raises(ValueError, match=rf"1 not floating point: {names[0]}"):
        from_official(empty, {**state, names[0]: state[names[0]].long()})


def test_two_tensors_that_change_places_are_kept_apart() -> None:
    """The control of the round trip: values tell tensors of one shape apart."""
    state = official_state(tiny_model())
    first, second = "decoder_blocks.0.mlp.fc1.weight", "decoder_blocks.1.mlp.fc1.weight"
    swapped = {**state, first: state[second], second: state[first]}
    model = empty_tiny()
    load_official(model, swapped)  # shapes agree; tests/test_conformance.py shows that a golden notices
    assert not torch.equal(model.state_dict()["backbone." + first], state[first])


def test_the_error_names_the_model_that_it_is(tmp_path: Path) -> None:
    mappings = layout(create_model("tokenbridge-b")).mappings
    state = {name: torch.zeros(mapping.shape, dtype=torch.uint8) for name, mapping in mappings.items()}  # small
    torch.save({"model_ema": state, "model": state}, tmp_path / "wrong.pth")
    for name, described in (("tokenbridge-h", "tokenbridge-h"), ("mar-b", "MAR"), ("kl16", "KL-16")):
        with pytest.raises(ValueError, match=rf"not the state of {described} .* It is the state of tokenbridge-b\.$"):
            convert(tmp_path / "wrong.pth", tmp_path / "out", name)


# -------------------------------------------------------------------------------------------------- files


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> str:
    return declare_small_models(monkeypatch)


def test_a_checkpoint_with_its_arguments_loads_the_moving_average(tmp_path: Path, preset: str) -> None:
    path = write_checkpoint(tmp_path / "checkpoint-last.pth")
    model = load_tokenbridge(tmp_path, preset)  # the folder will do, as for the official --resume
    expected = tiny_model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.training
    plain = load_tokenbridge(path, preset, ema=False).state_dict()
    assert torch.equal(plain["backbone.mask_token"], expected["backbone.mask_token"] + 1)


def test_weights_outlive_their_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoint.pth")
    state = read_checkpoint(path)
    path.write_bytes(b"")  # a file still mapped would kill the process here
    assert torch.equal(state["mask_token"], tiny_model().backbone.mask_token.detach())


def test_the_old_file_format_loads_too(tmp_path: Path) -> None:
    state = {"decoder.conv_in.bias": torch.arange(3.0)}
    torch.save({"model": state}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    loaded = read_checkpoint(tmp_path / "old.ckpt", ema=False)
    assert torch.equal(loaded["decoder.conv_in.bias"], torch.arange(3.0))


def test_kl16_file_and_its_images(tmp_path: Path, preset: str) -> None:
    vae = small_vae()
    write_kl16(tmp_path / "kl16.ckpt")
    loaded = load_kl16(tmp_path / "kl16.ckpt")
    image = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(loaded(image).sample, vae(image).sample)
    assert loaded.config.scaling_factor == 0.2325
    convert(tmp_path / "kl16.ckpt", tmp_path / "vae", "kl16")
    again = AutoencoderKL.from_pretrained(tmp_path / "vae")
    with torch.inference_mode():
        assert torch.equal(again.eval()(image).sample, vae(image).sample)


def test_convert_writes_a_folder_that_loads(tmp_path: Path, preset: str) -> None:
    path = write_checkpoint(tmp_path / "checkpoint.pth")
    convert(path, tmp_path / "model", preset)
    with pytest.raises(UserError, match="already holds a converted model"):
        convert(path, tmp_path / "model", preset)
    convert(path, tmp_path / "model", preset, overwrite=True)
    assert (tmp_path / "model" / "diffusion_pytorch_model.safetensors").is_file()
    loaded = TokenBridge.from_pretrained(tmp_path / "model", low_cpu_mem_usage=False).state_dict()
    expected = tiny_model().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    with pytest.raises(UserError, match=r"checkpoint\.pth"):
        convert(path, tmp_path, preset, overwrite=True)  # the user's own file lies there
    assert path.is_file()


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = write_checkpoint(tmp_path / "evil.pth", epoch=Malicious(mark))
    with pytest.raises(ValueError, match=r"evil\.pth holds pickled code, which is never run \(posix\.mkdir\)"):
        read_checkpoint(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the control: it would have run
    assert mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_file_says_so(tmp_path: Path, share: float) -> None:
    path = write_checkpoint(tmp_path / "checkpoint.pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=rf"checkpoint\.pth \({path.stat().st_size:,} bytes\) is truncated"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch, of what looks like another pickle protocol
def test_random_bytes_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "noise.pth"
    for seed in range(50):
        path.write_bytes(np.random.default_rng(seed).bytes(200))
        with pytest.raises(ValueError, match=r"noise\.pth \(200 bytes\) is truncated, damaged or not a checkpoint"):
            read_checkpoint(path)


def test_files_that_are_no_checkpoints(tmp_path: Path, preset: str) -> None:
    page = tmp_path / "page.pth"
    page.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"page\.pth \(16 bytes\) is truncated, damaged or not a checkpoint"):
        read_checkpoint(page)
    with pytest.raises(FileNotFoundError, match=r"checkpoint-last\.pth"):
        load_tokenbridge(tmp_path, preset)
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"holds no weights under 'model_ema'; it has keys \['state_dict'\]"):
        read_checkpoint(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="it has a list"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"model": {"a": 3}}, tmp_path / "numbers.pth")
    with pytest.raises(ValueError, match="'a' under 'model' is not a tensor"):
        read_checkpoint(tmp_path / "numbers.pth", ema=False)
    write_checkpoint(tmp_path / "no-average.pth", model_ema=None)  # the official code writes None without EMA
    with pytest.raises(ValueError, match="no weights under 'model_ema'"):
        read_checkpoint(tmp_path / "no-average.pth")


def test_a_checkpoint_of_another_size_names_its_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"small\.pth: This is not the state of tokenbridge-l .*of another shape"):
        load_tokenbridge(path, "tokenbridge-l")
