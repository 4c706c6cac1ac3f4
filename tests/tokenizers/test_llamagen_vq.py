"""LlamaGen's VQ tokenizer: nearest codes, pixels, official names and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from official_names import layout, load_official, rule_state, to_official
from published import published_shapes
from torch import Tensor

from tokenbridge.data.images import images_to_pixels
from tokenbridge.tokenizers import llamagen_vq as lv
from tokenbridge.tokenizers.base import Tokenizer
from tokenbridge.tokenizers.llamagen_vq import LlamaGenVQ
from tokenbridge.weights.diffusers import load_model, save_model
from tokenbridge.weights.published import Preset

SMALL: dict[str, Any] = {
    "num_codes": 20,
    "code_channels": 3,
    "encoder_multipliers": (1, 1),
    "decoder_multipliers": (1, 1),
    "latent_channels": 8,
}


def empty(**changes: Any) -> LlamaGenVQ:
    with torch.device("meta"):
        return LlamaGenVQ(**{**SMALL, **changes}).eval()


def small(**changes: Any) -> LlamaGenVQ:
    """Return a tokenizer with the goldens' weights, codes of many lengths."""
    vq = empty(**changes)
    load_official(vq, rule_state(vq, {"rule": "fan-in-normal-v1", "salt": "vq"}))
    return vq


VQ = small()
PLAIN = small(l2_norm=False)
IMAGES = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", lv.PRESETS)
def test_parameters_and_names_of_a_preset(name: str) -> None:
    preset, vq = lv.PRESETS[name], lv.create_vq(name)
    assert sum(parameter.numel() for parameter in vq.parameters()) == preset.num_parameters
    assert vq.device.type == "meta"
    shapes = {key: mapping.shape for key, mapping in layout(vq).mappings.items()}
    assert shapes | {lv.USAGE: (lv.USAGE_SIZE,)} == published_shapes(preset.official_name)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="Unknown tokenizer 'vq32'"):
        lv.create_vq("vq32")


# ------------------------------------------------------------------------------------------------ codes


@given(st.integers(0, 2**31), st.booleans(), st.floats(0.01, 100))
@torch.inference_mode()
def test_nearest_code_against_brute_force(seed: int, l2_norm: bool, length: float) -> None:
    vq = VQ if l2_norm else PLAIN
    latents = torch.randn(2, 3, 2, 3, generator=torch.Generator().manual_seed(seed)) * length
    tokens = vq.nearest(latents)
    for i, (image, row, column) in enumerate((b, r, c) for b in range(2) for r in range(2) for c in range(3)):
        x, codes = latents[image, :, row, column].double(), vq.embedding.double()
        if l2_norm:
            x, codes = x / x.norm(), codes / codes.norm(dim=1, keepdim=True)
        distances = torch.stack([(x - code).square().sum() for code in codes])
        chosen = tokens.flatten()[i]
        # float32 sums of squares: another code may win by less than their rounding.
        assert distances[chosen] <= distances.min() + 1e-6 * (1 + x.square().sum())


@given(st.integers(0, 2**31), st.floats(0.01, 100))
@torch.inference_mode()
def test_the_length_of_a_latent_plays_no_part(seed: int, length: float) -> None:
    latents = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    assert (VQ.nearest(latents) != VQ.nearest(latents * length)).float().mean() < 0.1  # rounding of near ties


@torch.inference_mode()
def test_without_normalisation_it_does() -> None:
    latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (PLAIN.nearest(latents) != PLAIN.nearest(latents * 10)).any()
    assert not torch.equal(PLAIN.codebook, VQ.codebook)
    torch.testing.assert_close(VQ.codebook.norm(dim=1), torch.ones(20))


@pytest.mark.parametrize("vq", [VQ, PLAIN], ids=["l2", "plain"])
@torch.inference_mode()
def test_a_code_is_nearest_to_itself(vq: LlamaGenVQ) -> None:
    tokens = torch.arange(20).view(1, 4, 5)
    assert torch.equal(vq.nearest(vq.lookup(tokens)), tokens)
    assert vq.lookup(tokens).shape == (1, 3, 4, 5)


# -------------------------------------------------------------------------------------------- tokenizer


def test_encode_and_decode() -> None:
    tokenizer: Tokenizer = VQ
    tokens = tokenizer.encode(IMAGES)
    assert tokens.shape == (2, 4, 6)
    assert len(tokens.unique()) > 3
    images = tokenizer.decode(tokens)
    assert images.shape == IMAGES.shape
    assert images.abs().max() <= 1
    assert torch.equal(tokenizer.reconstruct(IMAGES), images)
    assert tokenizer.bits_per_image(tokens) == pytest.approx(24 * 4.321928)
    alone = tokenizer.decode(tokens[1:])
    torch.testing.assert_close(alone, images[1:], atol=1e-5, rtol=0)
    for wrong in (-1, 20):
        with pytest.raises(ValueError, match=r"Tokens must be in \[0, 20\)"):
            tokenizer.decode(tokens.clone().fill_(wrong))


def test_levels_need_not_agree() -> None:
    """Attention is in the deepest level of each side, however many there are."""
    vq = small(encoder_multipliers=(1,), decoder_multipliers=(2, 1))
    assert vq.encode(IMAGES).shape == (2, 8, 12)
    assert vq.decode(vq.encode(IMAGES)).shape == (2, 3, 16, 24)
    names = layout(vq).mappings
    assert {"encoder.conv_blocks.0.attn.1.q.weight", "decoder.conv_blocks.0.attn.2.proj_out.bias"} < names.keys()
    assert "decoder.conv_blocks.1.attn.0.q.weight" not in names


def test_save_and_load(tmp_path: Path) -> None:
    vq = small()
    save_model(vq, tmp_path / "vq")
    loaded = load_model(LlamaGenVQ, tmp_path / "vq", expected=SMALL)
    assert torch.equal(loaded.encode(IMAGES), vq.encode(IMAGES))


# ----------------------------------------------------------------------------------------------- pixels


def test_pixels_are_cut_off() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.99, 1.0, 2.0]).expand(1, 3, 6, 6)
    assert lv.official_pixels(values, 6)[0, 0, 0].tolist() == [0, 0, 128, 254, 255, 255]
    # Half-way between two levels they go up; rounding goes to the even one.
    halves = (torch.arange(255.0) - 127) / 127.5
    up = (127.5 * halves + 128).floor()  # 1 to 255, but where float32 falls short of the integer
    assert lv.official_pixels(halves.expand(1, 3, 255, 255), 255)[0, 0, 0].tolist() == up.tolist()
    assert (up - images_to_pixels(halves)).unique().tolist() == [0, 1]


def test_pixels_are_rounded_everywhere_else() -> None:
    levels = torch.arange(256.0).repeat_interleave(2)[1:] + torch.tensor([0.4, -0.4]).repeat(256)[:511]
    images = (levels / 127.5 - 1).expand(1, 3, 511, 511)
    assert torch.equal(lv.official_pixels(images, 511), images_to_pixels(images))


def test_images_are_scaled_before_they_are_clamped() -> None:
    images = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 3
    pixels = lv.official_pixels(images, 4)
    assert pixels.shape == (1, 3, 4, 4)
    assert not torch.equal(pixels, lv.official_pixels(images.clamp(-1, 1), 4))
    smooth = F.interpolate(images, size=(4, 4), mode="bicubic", antialias=True)
    assert not torch.equal(pixels, lv.official_pixels(smooth, 4))


def test_pixels_of_tokens() -> None:
    tokens = VQ.encode(IMAGES)[:, :, :4]
    pixels = VQ.pixels(tokens, size=6)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (2, 3, 6, 6)
    with torch.inference_mode():
        assert torch.equal(pixels, lv.official_pixels(VQ.raw_images(VQ.lookup(tokens)), 6))


# ------------------------------------------------------------------------------- official names and files

STATE = to_official(VQ)
USAGE = {"quantize.codebook_used": torch.zeros(65536)}  # the official class saves it too


def test_there_and_back() -> None:
    other = empty()
    load_official(other, STATE)
    assert all(torch.equal(value, STATE[name]) for name, value in to_official(other).items())
    assert torch.equal(other.encode(IMAGES), VQ.encode(IMAGES))
    assert STATE["encoder.mid.1.q.weight"].shape == (128, 128, 1, 1)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("decoder.conv_blocks.0.attn.0.q.weight", "decoder.conv_blocks.0.attn.0.v.weight"),
        ("decoder.conv_blocks.0.res.0.conv1.weight", "decoder.conv_blocks.1.res.0.conv1.weight"),
        ("decoder.mid.0.norm1.weight", "decoder.mid.2.norm1.weight"),
    ],
)
def test_two_tensors_that_change_places_are_noticed(first: str, second: str) -> None:
    """The control of the mapping: shapes cannot tell these apart, the numbers do."""
    other = empty()
    load_official(other, {**STATE, first: STATE[second], second: STATE[first]})
    codes = VQ.lookup(VQ.encode(IMAGES))
    assert (other.raw_images(codes) - VQ.raw_images(codes)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantize.embedding.weight": None}, r"1 missing: quantize\.embedding\.weight"),
        ({"quantize.codebook_used": torch.zeros(3)}, r"codebook_used has the shape \[3\]"),
        ({"quantize.counts": torch.zeros(3)}, r"1 left over: quantize\.counts"),
        ({"quant_conv.weight": torch.zeros(3, 8)}, "of another shape"),
    ],
)
def test_loading_is_strict(
    changes: dict[str, Tensor | None], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lv.PRESETS, "small", Preset(name="small", model=SMALL, num_parameters=0))
    state = {name: value for name, value in (STATE | USAGE | changes).items() if value is not None}
    path = tmp_path / "vq_ds2.pt"
    torch.save({"model": state}, path)
    with pytest.raises(ValueError, match=rf"vq_ds2\.pt: .*{reason}"):
        lv.load_vq(path, "small")


def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lv.PRESETS, "small", Preset(name="small", model=SMALL, num_parameters=0))
    path = tmp_path / "vq_ds2.pt"
    torch.save({"model": STATE | USAGE, "discriminator": {"w": torch.zeros(2)}, "steps": 5}, path)
    loaded = lv.load_vq(path, "small")
    assert torch.equal(loaded.encode(IMAGES), VQ.encode(IMAGES))
    torch.save({"model": STATE}, path)
    assert torch.equal(lv.load_vq(path, "small").codebook, VQ.codebook)  # the record of used codes may be absent
    torch.save({"model": STATE | {"more": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"vq_ds2\.pt: .*1 left over: more"):
        lv.load_vq(path, "small")
