"""Image tokenizers, which encode images to tokens and decode tokens to images.

- `LatentTokenizer` puts a scalar quantiser on the latents of any diffusers autoencoder after training. The paper's
  tokenizer is KL-16 with a Gaussian quantiser of 64 levels.
- `VQTokenizer` is a VQ autoencoder (diffusers' VQModel), whose codebook is trained with it. The paper compares the
  two.

Both take and return images [B, 3 or 1, H, W] in [-1, 1].
Shape letters: B batch, C latent channels, h, w latent height and width.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from tokenbridge.data.images import bounded, finite, images_to_pixels
from tokenbridge.tokenizers.quantizer import ScalarQuantizer
from tokenbridge.utils.errors import UserError
from tokenbridge.weights.diffusers import check_scale


class Tokenizer(Protocol):
    """The methods of a tokenizer that reconstruction and the tables call."""

    @property
    def device(self) -> torch.device:
        """The device of the model, on which images and tokens must be."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Return the integer tokens of images."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the images [B, C, H, W] in [-1, 1] of tokens."""
        ...

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode and decode images."""
        ...

    def bits_per_image(self, tokens: Tensor) -> float:
        """Return how many bits one image's tokens take without entropy coding."""
        ...


class LatentTokenizer:
    """A continuous autoencoder with a quantiser on its scaled latents.

    The autoencoder's diffusers configuration holds the scale of the latents (`scaling_factor`, `shift_factor`). The
    latents here are (autoencoder latents - shift) * scale and have about unit variance.

    Args:
        autoencoder: AutoencoderKL, AutoencoderTiny or another diffusers autoencoder with `encode` and `decode`.
        quantizer: the quantiser of the scaled latents. With None they stay continuous, and there are no tokens.
    """

    def __init__(self, autoencoder: Any, quantizer: ScalarQuantizer | None = None) -> None:
        self.autoencoder = autoencoder.eval()
        self.quantizer = quantizer
        check_scale(autoencoder.config, type(autoencoder).__name__)
        self.scale = float(getattr(autoencoder.config, "scaling_factor", None) or 1.0)
        self.shift = float(getattr(autoencoder.config, "shift_factor", None) or 0.0)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.autoencoder.parameters()).device

    @torch.inference_mode()
    def latents(self, images: Tensor) -> Tensor:
        """Return the scaled latents [B, C, h, w] of images: the mean, if the autoencoder has a posterior."""
        output = self.autoencoder.encode(images.to(self.autoencoder.dtype))
        if hasattr(output, "latent_dist"):
            raw = output.latent_dist.mode()
        else:
            raw = output.latents if hasattr(output, "latents") else output.latent  # AutoencoderDC says `latent`
        return (raw.float() - self.shift) * self.scale

    @torch.inference_mode()
    def images(self, latents: Tensor) -> Tensor:
        """Decode scaled latents [B, C, h, w] to images, clamped to [-1, 1]."""
        raw = (latents / self.scale + self.shift).to(self.autoencoder.dtype)
        return bounded(self.autoencoder.decode(raw).sample.float())

    def to_pixels(self, images: Tensor) -> Tensor:
        """Convert the output of `images` to uint8 pixels."""
        return images_to_pixels(images)

    def encode(self, images: Tensor) -> Tensor:
        """Return the tokens [B, C, h, w] of images."""
        return self._quantizer().encode(self.latents(images))

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the images of tokens [B, C, h, w]."""
        return self.images(self._quantizer().decode(tokens))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode and decode images, with quantisation if there is a quantiser."""
        latents = self.latents(images)
        return self.images(latents if self.quantizer is None else self.quantizer(latents))

    def bits_per_image(self, tokens: Tensor) -> float:
        """Return how many bits one image's tokens take, log2(levels) each."""
        return tokens[0].numel() * math.log2(self._quantizer().num_levels)

    def _quantizer(self) -> ScalarQuantizer:
        assert self.quantizer is not None, "a tokenizer without a quantiser reconstructs, but has no tokens"
        return self.quantizer


class VQTokenizer:
    """A VQ autoencoder (diffusers' VQModel), whose tokens are indices into its trained codebook, one per position."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.num_codes = int(model.config.num_vq_embeddings)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Return the tokens [B, h, w] of images."""
        latents = finite(self.model.encode(images).latents)
        _, _, (_, _, indices) = self.model.quantize(latents)
        return indices.view(latents.shape[0], *latents.shape[2:])

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Return the images of tokens [B, h, w], clamped to [-1, 1].

        Raises:
            UserError: a token is outside the codebook.
        """
        if tokens.numel() and not (0 <= int(tokens.min()) and int(tokens.max()) < self.num_codes):
            raise UserError(f"Tokens must be in [0, {self.num_codes}).")
        latents = self.model.quantize.embedding(tokens).permute(0, 3, 1, 2)
        return bounded(self.model.decode(latents, force_not_quantize=True).sample)

    def images(self, codes: Tensor) -> Tensor:
        """Return the images of codes [B, h, w]; this is `decode` by the name that `LatentTokenizer` has for it."""
        return self.decode(codes)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Convert the output of `images` to uint8 pixels."""
        return images_to_pixels(images)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode and decode images."""
        return self.decode(self.encode(images))

    def bits_per_image(self, tokens: Tensor) -> float:
        """Return how many bits one image's tokens take, log2(codes) each."""
        return tokens[0].numel() * math.log2(self.num_codes)


def autoencoder_loss(model: Any, images: Tensor, *, kl_weight: float) -> Tensor:
    """Return the loss of a KL autoencoder: squared error + kl_weight * KL(posterior, N(0, 1)), each per pixel.

    Args:
        model: diffusers' AutoencoderKL.
        images: [B, C, H, W] in [-1, 1].
        kl_weight: with a small weight all latent channels stay in use; with a large one most of them collapse.
    """
    posterior = model.encode(images).latent_dist
    reconstruction = model.decode(posterior.sample()).sample
    kl = posterior.kl().mean() / images[0].numel()
    return F.mse_loss(reconstruction, images) + kl_weight * kl


def vq_loss(model: Any, images: Tensor) -> Tensor:
    """Return the loss of diffusers' VQModel: squared error per pixel plus the codebook and commitment terms."""
    output = model(images)
    return F.mse_loss(output.sample, images) + output.commit_loss.mean()


def sample_posterior(moments: Tensor) -> Tensor:
    """Draw latents [B, C, h, w] from moments [B, 2C, h, w] (mean, log-variance) of a KL autoencoder.

    The generators are trained on posterior samples, as in the official engine. diffusers clamps the log-variance to
    [-30, 20], as the official class does.
    """
    return DiagonalGaussianDistribution(moments).sample()
