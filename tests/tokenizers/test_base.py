"""The tokenizers: diffusers autoencoders with a quantiser on their latents, and VQ models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC
from tiny_autoencoders import tiny_kl, tiny_taesd, tiny_vq
from torch import Tensor

from tokenbridge.tokenizers.base import LatentTokenizer, VQTokenizer, autoencoder_loss, sample_posterior, vq_loss
from tokenbridge.tokenizers.quantizer import gaussian_quantizer

LEVELS = 16
CODES = 12


def tiny_dc() -> AutoencoderDC:
    """Return a random AutoencoderDC of factor 4 with 4 latent channels."""
    torch.manual_seed(0)
    return AutoencoderDC(
        latent_channels=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        encoder_out_shortcut=False,
    ).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    smooth = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(smooth, size=(16, 24), mode="bilinear")


@pytest.mark.parametrize("make", [tiny_kl, tiny_taesd, tiny_dc])
def test_any_autoencoder_becomes_a_tokenizer(make: Any, images: Tensor) -> None:
    tokenizer = LatentTokenizer(make(), gaussian_quantizer(LEVELS))
    tokens = tokenizer.encode(images)
    assert tokens.dtype == torch.int64
    assert tokens.shape[2:] == (4, 6)
    assert 0 <= tokens.min() and tokens.max() < LEVELS  # noqa: PT018
    assert torch.equal(tokenizer.decode(tokens), tokenizer.reconstruct(images))
    assert tokenizer.decode(tokens).shape == images.shape
    assert tokenizer.decode(tokens).abs().max() <= 1
    assert tokenizer.bits_per_image(tokens) == tokens[0].numel() * math.log2(LEVELS)
    assert tokenizer.device == torch.device("cpu")


def test_latents_are_scaled_posterior_means(images: Tensor) -> None:
    model = tiny_kl()
    raw = model.encode(images).latent_dist.mean
    assert torch.equal(LatentTokenizer(model).latents(images), (raw - 0.25) * 2)
    unscaled = LatentTokenizer(tiny_kl(scaling_factor=None, shift_factor=None))
    assert torch.equal(unscaled.latents(images), raw)


def test_scaling_is_undone_before_decoding(images: Tensor) -> None:
    model = tiny_kl()
    expected = model.decode(model.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    # Scaling and back rounds the latents in their last bits.
    assert torch.allclose(LatentTokenizer(model).reconstruct(images), expected, atol=1e-5)


def test_no_quantiser_no_tokens(images: Tensor) -> None:
    tokenizer = LatentTokenizer(tiny_taesd())
    assert tokenizer.reconstruct(images).shape == images.shape
    for use in (tokenizer.encode, tokenizer.bits_per_image):
        with pytest.raises(AssertionError, match="without a quantiser"):
            use(images)


def test_vq_tokens_are_the_nearest_codes(images: Tensor) -> None:
    model = tiny_vq()
    tokens = VQTokenizer(model).encode(images)
    latents = model.encode(images).latents.permute(0, 2, 3, 1)
    distances = (latents.unsqueeze(-2) - model.quantize.embedding.weight).square().sum(-1)
    assert torch.equal(tokens, distances.argmin(-1))
    assert len(tokens.unique()) > 2  # else the test shows nothing


def test_vq_reconstructs_as_the_model_itself_does(images: Tensor) -> None:
    model = tiny_vq()
    tokenizer = VQTokenizer(model)
    tokens = tokenizer.encode(images)
    assert torch.equal(tokenizer.decode(tokens), tokenizer.reconstruct(images))
    # The model adds codes to latents and takes the latents off again, which rounds.
    assert torch.allclose(tokenizer.reconstruct(images), model(images).sample.clamp(-1, 1), atol=1e-5)
    assert tokenizer.bits_per_image(tokens) == 4 * 6 * math.log2(CODES)


@pytest.mark.parametrize("wrong", [-1, LEVELS])
def test_tokens_out_of_range_are_refused(wrong: int) -> None:
    tokens = torch.zeros(1, 6, 4, 4, dtype=torch.int64)
    tokens[0, 0, 0, 0] = wrong
    with pytest.raises(ValueError, match="16 levels"):
        LatentTokenizer(tiny_kl(), gaussian_quantizer(LEVELS)).decode(tokens)
    with pytest.raises(ValueError, match=r"\[0, 12\)"):
        VQTokenizer(tiny_vq()).decode(tokens[:, 0])


def test_autoencoder_loss_is_error_and_divergence_per_pixel(images: Tensor) -> None:
    model = tiny_kl()
    torch.manual_seed(3)
    without = autoencoder_loss(model, images, kl_weight=0)
    torch.manual_seed(3)
    weighted = autoencoder_loss(model, images, kl_weight=0.5)
    posterior = model.encode(images).latent_dist
    mean, variance = posterior.mean, posterior.var
    divergence = 0.5 * (mean**2 + variance - variance.log() - 1).sum(dim=(1, 2, 3)).mean()
    assert torch.isclose(weighted - without, 0.5 * divergence / images[0].numel(), rtol=1e-4)
    torch.manual_seed(3)
    decoded = model.decode(posterior.sample()).sample
    assert torch.isclose(without, (decoded - images).square().mean())


def test_vq_loss_trains_the_codebook(images: Tensor) -> None:
    model = tiny_vq().train()
    loss = vq_loss(model, images)
    loss.backward()
    assert model.quantize.embedding.weight.grad.abs().sum() > 0
    assert loss > (model(images).sample - images).square().mean()


def test_posterior_samples_have_the_moments() -> None:
    torch.manual_seed(4)
    mean, log_variance = torch.tensor(1.5), torch.tensor(-2.0)
    moments = torch.stack([mean, log_variance]).view(1, 2, 1, 1).expand(1, 2, 100, 100)
    samples = sample_posterior(moments)
    assert samples.shape == (1, 1, 100, 100)
    # 10,000 draws: standard errors are 0.4 % of the deviation for the mean and 0.7 % for the deviation.
    assert samples.mean().item() == pytest.approx(1.5, abs=0.01)
    assert samples.std().item() == pytest.approx(math.exp(-1), rel=0.03)
