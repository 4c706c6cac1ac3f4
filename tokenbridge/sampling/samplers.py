"""Samplers: a generator and its tokenizer, with weights, ready to make images. One for each system.

Each is a `run.Sampler`: an image is a function of seed, number and label; or, without a seed, of numpy's and torch's
global streams, drawn in the order of the official code. GIVT's official code is in JAX, whose numbers torch cannot
make, so that it has no such order here.

Shape letters: B batch, C channels, H height, W width, L positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import VQModel
from torch import Tensor

from tokenbridge.data.images import images_to_pixels
from tokenbridge.models.givt import sampling as givt_sampling
from tokenbridge.models.llamagen import sampling as llamagen_sampling
from tokenbridge.models.mar import sampling as mar_sampling
from tokenbridge.models.noise import global_noise, image_noise
from tokenbridge.models.tokenbridge.sampling import generate_tokens
from tokenbridge.sampling.run import refuse
from tokenbridge.tokenizers.base import LatentTokenizer, VQTokenizer
from tokenbridge.tokenizers.llamagen_vq import LlamaGenVQ, official_pixels
from tokenbridge.utils.devices import DTYPES, Dtype
from tokenbridge.utils.files import sha256_of
from tokenbridge.weights.rule import RULE

STAND_IN_SALT = "stand-in"
EVALUATED_SIZE = 256  # LlamaGen's larger images are scaled down to it (sample_c2i_ddp.py, --image-size-eval)


@dataclass(frozen=True)
class ModelSampler:
    """What the samplers of all systems share."""

    name: str
    model: Any
    tokenizer: Any  # `LatentTokenizer`; of LlamaGen, `LlamaGenVQ` or `VQTokenizer`
    sampling: Any  # settings of the model's system
    dtype: Dtype
    files: Mapping[str, Path]  # that the weights were read from, by part; none for stand-ins
    compiled: bool = False

    system: ClassVar[str]
    # The weights are in half precision, and not autocast around them.
    casts_weights: ClassVar[bool] = False

    @property
    def stand_in(self) -> bool:
        """Whether the weights were drawn by rule."""
        return not self.files

    @property
    def num_classes(self) -> int:
        """Number of class labels."""
        return int(self.model.num_classes)

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return image_size(self.model.latent_size, decoder_of(self.tokenizer))

    @property
    def channels(self) -> int:
        """Colour channels of the images."""
        return image_channels(decoder_of(self.tokenizer))

    def images(self, labels: Tensor, indices: Sequence[int], seed: int | None) -> Tensor:
        """Make a batch of images (see `run.Sampler`)."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Return settings, precision and the weights' SHA-256."""
        rule = {"rule": RULE, "salt": STAND_IN_SALT}
        return {
            "system": self.system,
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "sampling": asdict(self.sampling),
            "dtype": self.dtype,
            "compiled": self.compiled,
            "weights": {part: sha256_of(path) for part, path in self.files.items()} or rule,
        }

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the precision that the model runs in; nothing is cast if its weights are in it already."""
        enabled = self.dtype != "fp32" and not self.casts_weights
        return torch.autocast(self.model.device.type, DTYPES[self.dtype], enabled=enabled)


class LatentSampler(ModelSampler):
    """A system whose model makes latents, and a VAE images of them."""

    @torch.inference_mode()
    def images(self, labels: Tensor, indices: Sequence[int], seed: int | None) -> Tensor:
        """Make a batch of images (see `run.Sampler`)."""
        with self.autocast():  # around the VAE too, as the official evaluations of TokenBridge and MAR
            images = self.tokenizer.images(self.latents(labels, list(indices), seed))
        refuse(images.flatten(1).isnan().any(dim=1), "has NaN pixels")
        return images_to_pixels(images).cpu()

    def latents(self, labels: Tensor, indices: list[int], seed: int | None) -> Tensor:
        """Generate the latents [B, C, h, w] of a batch of images."""
        raise NotImplementedError


class TokenBridgeSampler(LatentSampler):
    """TokenBridge."""

    system = "tokenbridge"

    def latents(self, labels: Tensor, indices: list[int], seed: int | None) -> Tensor:
        """Generate tokens, and look their values up."""
        length = self.model.num_positions
        noise = (
            global_noise(len(labels), length)
            if seed is None
            else image_noise(seed, indices, length, self.model.num_channels)
        )
        tokens = generate_tokens(self.model, labels, self.sampling, noise)
        refuse(tokens.flatten(1).amin(dim=1) < 0, "has NaN logits")
        latents: Tensor = self.model.to_latents(tokens)
        return latents

    def describe(self) -> dict[str, Any]:
        """Return what all samplers say, and the channel order."""
        return {**super().describe(), "channel_order": list(self.model.channel_order)}


class MarSampler(LatentSampler):
    """MAR."""

    system = "mar"

    def latents(self, labels: Tensor, indices: list[int], seed: int | None) -> Tensor:
        """Generate latents by diffusion, position by position."""
        length, channels = self.model.num_positions, self.model.num_channels
        if seed is None:
            guided = self.sampling.guidance_scale != 1
            noise = mar_sampling.global_noise(len(labels), length, channels, guided=guided, device=self.model.device)
        else:
            noise = mar_sampling.latent_noise(seed, indices, length, channels)
        return mar_sampling.generate_latents(self.model, labels, self.sampling, noise)


class GivtSampler(LatentSampler):
    """GIVT."""

    system = "givt"

    def latents(self, labels: Tensor, indices: list[int], seed: int | None) -> Tensor:
        """Draw latents from mixtures, in raster order."""
        assert seed is not None, "systems.check refuses the global streams"
        return givt_sampling.generate_latents(
            self.model,
            labels,
            self.sampling,
            lambda position: givt_sampling.StreamNoise(seed, indices, position, self.model),
        )


class LlamaGenSampler(ModelSampler):
    """LlamaGen: by its own tokenizer as its script samples (sample_c2i_ddp.py), or by another VQ autoencoder."""

    system = "llamagen"
    casts_weights = True  # of the GPT; the tokenizer stays in float32

    @torch.inference_mode()
    def images(self, labels: Tensor, indices: Sequence[int], seed: int | None) -> Tensor:
        """Make a batch of images (see `run.Sampler`)."""
        length, side = self.model.num_positions, self.model.latent_size
        uniforms = None if seed is None else image_noise(seed, list(indices), length, 1).uniforms[..., 0]
        tokens = llamagen_sampling.generate_tokens(self.model, labels, self.sampling, uniforms)
        refuse(tokens.amin(dim=1) < 0, "has NaN logits")
        tokens = tokens.unflatten(1, (side, side))
        own = isinstance(self.tokenizer, LlamaGenVQ)
        vq = self.tokenizer
        images = vq.raw_images(vq.lookup(tokens)).float() if own else vq.decode(tokens)
        refuse(images.flatten(1).isnan().any(dim=1), "has NaN pixels")
        return (official_pixels(images, self.image_size) if own else images_to_pixels(images)).cpu()


SAMPLERS: dict[str, type[ModelSampler]] = {
    sampler.system: sampler for sampler in (TokenBridgeSampler, MarSampler, LlamaGenSampler, GivtSampler)
}


def as_tokenizer(decoder: Any) -> Any:
    """Return an autoencoder as the tokenizer that samplers take."""
    if isinstance(decoder, LlamaGenVQ):
        return decoder
    return VQTokenizer(decoder) if isinstance(decoder, VQModel) else LatentTokenizer(decoder)


def decoder_of(tokenizer: Any) -> Any:
    """Return the autoencoder in a tokenizer; the inverse of `as_tokenizer`."""
    if isinstance(tokenizer, LatentTokenizer):
        return tokenizer.autoencoder
    return tokenizer.model if isinstance(tokenizer, VQTokenizer) else tokenizer


def image_size(latent_size: int, decoder: Any) -> int:
    """Return height and width of the images, of an autoencoder on any device.

    It doubles the latents' at every level but one; what LlamaGen's makes is scaled down to 256 if it is larger.
    """
    names = ("block_out_channels", "width_multipliers", "decoder_multipliers")
    levels = next(decoder.config[name] for name in names if name in decoder.config)
    size = int(latent_size * 2 ** (len(levels) - 1))
    return min(size, EVALUATED_SIZE) if isinstance(decoder, LlamaGenVQ) else size


def image_channels(decoder: Any) -> int:
    """Return the colour channels of an autoencoder's images; LlamaGen's has always three."""
    config = decoder.config
    return int(config.get("out_channels") or config.get("image_channels") or 3)
