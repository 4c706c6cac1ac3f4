"""LlamaGen's VQ tokenizers VQ-16, which the published models use, and VQ-8, on diffusers' encoder and decoder.

Official code: FoundationVision/LlamaGen at ce98ec4, tokenizer/tokenizer_image/vq_model.py. diffusers' VQModel has
neither an l2-normalised codebook nor an encoder and decoder of different depth; its Encoder and Decoder fit.

Shape letters: B batch, C channels of a code, V codes, h, w height and width of the token grid.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tokenbridge.data.images import bounded, finite, llamagen_pixels
from tokenbridge.tokenizers.kl16 import LDM_WORDS
from tokenbridge.utils.errors import UserError
from tokenbridge.weights.official import Layout, ParamMapping, load_state
from tokenbridge.weights.published import Preset
from tokenbridge.weights.torch_files import read_weights


class LlamaGenVQ(ModelMixin, ConfigMixin):
    """A VQ autoencoder, whose token at a position is the code nearest in direction. It is a `Tokenizer` (base.py).

    Args:
        num_codes: V.
        code_channels: C.
        l2_norm: whether latents and codes are normalised whenever they are used, so that directions are compared.
            The stored codes are not normalised.
        encoder_multipliers: the width of each encoder level over 128. Every level but the last halves height and
            width.
        decoder_multipliers: the width of each decoder level over 128; the decoder runs the last one first.
        latent_channels: the width between the encoder or decoder and the codes.
    """

    @register_to_config
    def __init__(
        self,
        num_codes: int = 16384,
        code_channels: int = 8,
        l2_norm: bool = True,
        encoder_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        decoder_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        latent_channels: int = 256,
    ) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.l2_norm = l2_norm
        down = ("DownEncoderBlock2D",) * (len(encoder_multipliers) - 1)
        up = ("UpDecoderBlock2D",) * (len(decoder_multipliers) - 1)
        self.encoder = Encoder(
            out_channels=latent_channels,
            down_block_types=(*down, "AttnDownEncoderBlock2D"),
            block_out_channels=tuple(128 * m for m in encoder_multipliers),
            double_z=False,
        )
        self.decoder = Decoder(
            in_channels=latent_channels,
            up_block_types=("AttnUpDecoderBlock2D", *up),
            block_out_channels=tuple(128 * m for m in decoder_multipliers),
        )
        self.quant_conv = nn.Conv2d(latent_channels, code_channels, 1)
        self.post_quant_conv = nn.Conv2d(code_channels, latent_channels, 1)
        codes = torch.empty(num_codes, code_channels).uniform_(-1 / num_codes, 1 / num_codes)
        self.embedding = nn.Parameter(self.normalise(codes, dim=-1))

    def normalise(self, x: Tensor, *, dim: int) -> Tensor:
        """Scale x to length 1 along `dim` if this tokenizer has `l2_norm`."""
        return F.normalize(x, dim=dim) if self.l2_norm else x

    @property
    def codebook(self) -> Tensor:
        """The codes [V, C], normalised if this tokenizer has `l2_norm`."""
        return self.normalise(self.embedding, dim=-1)

    def latents(self, images: Tensor) -> Tensor:
        """Return the latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1], before any normalisation."""
        return self.quant_conv(self.encoder(images))

    def nearest(self, latents: Tensor) -> Tensor:
        """Return the tokens [B, h, w] of latents [B, C, h, w]: the nearest code, or the first of equally near ones."""
        x = self.normalise(latents.movedim(1, -1), dim=-1)
        codes = self.codebook
        # The squared distances are summed in the official order, so that rounding decides near ties alike.
        distances = x.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * (x @ codes.T)
        return distances.argmin(-1)

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the codes [B, C, h, w] of tokens [B, h, w]."""
        return F.embedding(tokens, self.codebook).movedim(-1, 1)

    def raw_images(self, codes: Tensor) -> Tensor:
        """Decode codes [B, C, h, w] to images, which are not clamped."""
        return self.decoder(self.post_quant_conv(codes))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Return the tokens [B, h, w] of images [B, 3, H, W] in [-1, 1]."""
        return self.nearest(finite(self.latents(images.to(self.dtype))))

    @torch.inference_mode()
    def decode(self, tokens: Tensor) -> Tensor:
        """Return the images of tokens [B, h, w], clamped to [-1, 1].

        Raises:
            UserError: a token is outside the codebook.
        """
        return bounded(self._decode(tokens))

    @torch.inference_mode()
    def images(self, codes: Tensor) -> Tensor:
        """Return the images of tokens [B, h, w], float32. `to_pixels` clamps them, after it has scaled them."""
        return self.raw_images(self.lookup(codes)).float()

    def to_pixels(self, images: Tensor) -> Tensor:
        """Convert the output of `images` to uint8 pixels, scaled down to 256 × 256 if it is larger."""
        return official_pixels(images, min(images.shape[-1], EVALUATED_SIZE))

    @torch.inference_mode()
    def pixels(self, tokens: Tensor, *, size: int = 256) -> Tensor:
        """Return the uint8 pixels [B, 3, size, size] of generated tokens, as the published evaluations made them.

        Raises:
            UserError: a token is outside the codebook.
        """
        return official_pixels(self._decode(tokens), size)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode and decode images."""
        return self.decode(self.encode(images))

    def bits_per_image(self, tokens: Tensor) -> float:
        """Return how many bits one image's tokens take, log2(codes) each."""
        return tokens[0].numel() * math.log2(self.num_codes)

    def _decode(self, tokens: Tensor) -> Tensor:
        if tokens.numel() and not (0 <= int(tokens.min()) and int(tokens.max()) < self.num_codes):
            raise UserError(f"Tokens must be in [0, {self.num_codes}).")
        return self.raw_images(self.lookup(tokens)).float()


# Parts of names in diffusers and in LlamaGen, where LlamaGen differs from LDM. Both count the decoder's levels in the
# order in which they run.
_WORDS = (
    ("down_blocks.", "conv_blocks."),
    ("up_blocks.", "conv_blocks."),
    ("mid_block.resnets.0.", "mid.0."),
    ("mid_block.attentions.0.", "mid.1."),
    ("mid_block.resnets.1.", "mid.2."),
    (".resnets.", ".res."),
    ("embedding", "quantize.embedding.weight"),
)


def official_pixels(images: Tensor, size: int) -> Tensor:
    """Scale images [B, 3, H, W] to [size, size] and map them to uint8 pixels, as the official evaluation does.

    Quirks kept (sample_c2i_ddp.py): images are scaled bicubically without anti-aliasing before they are clamped, and
    become pixels by `llamagen_pixels`. `images_to_pixels` rounds to the same value, except that half-way values always
    go up here.
    """
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, size=(size, size), mode="bicubic")
    return llamagen_pixels(images)


# ------------------------------------------------------------------------- published models and their files

EVALUATED_SIZE = 256  # larger images are scaled down to it (sample_c2i_ddp.py, --image-size-eval)
USAGE = "quantize.codebook_used"  # buffer of the official class with the last codes of its training
USAGE_SIZE = 65536

# README.md of FoundationVision/LlamaGen at ce98ec4, table "VQ-VAE models".
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="llamagen-vq16",
            model={"encoder_multipliers": (1, 1, 2, 2, 4), "decoder_multipliers": (1, 1, 2, 2, 4)},
            num_parameters=71_883_403,
            official_name="VQ-16",
        ),
        Preset(
            name="llamagen-vq8",
            model={"encoder_multipliers": (1, 2, 2, 4), "decoder_multipliers": (1, 2, 2, 4)},
            num_parameters=70_109_835,
            official_name="VQ-8",
        ),
    )
}


def create_vq(name: str = "llamagen-vq16", **changes: Any) -> LlamaGenVQ:
    """Build a preset on the meta device, which takes no memory, in evaluation mode.

    Args:
        changes: keyword arguments of `LlamaGenVQ` that replace those of the preset.

    Raises:
        UserError: no preset is called `name`.
    """
    if name not in PRESETS:
        raise UserError(f"Unknown tokenizer {name!r}; there are {', '.join(PRESETS)}.")
    with torch.device("meta"):
        return LlamaGenVQ(**{**PRESETS[name].model, **changes}).eval()


def vq_layout(vq: LlamaGenVQ) -> Layout:
    """Return the layout of the official tensors."""
    mappings = {}
    for name, parameter in vq.named_parameters():
        official = name
        for ours, theirs in (*_WORDS, *LDM_WORDS):
            official = official.replace(ours, theirs)
        # The official attention projections are 1 × 1 convolutions.
        ones = (1, 1) if official.endswith((".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")) else ()
        mappings[official] = ParamMapping(name, (*parameter.shape, *ones))
    return Layout(mappings, "LlamaGenVQ")


def load_vq(path: Path | str, name: str = "llamagen-vq16") -> LlamaGenVQ:
    """Load a published tokenizer (`vq_ds16_c2i.pt`), in evaluation mode.

    The file may hold the official class's record of the codes used in training, which is dropped.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is damaged, its tensors do not fit, or the record of used codes has another size.
    """
    vq, state = create_vq(name), read_weights(path)
    usage = state.pop(USAGE, None)
    if usage is not None and usage.shape != (USAGE_SIZE,):
        raise UserError(f"{path}: {USAGE} has the shape {list(usage.shape)} instead of [{USAGE_SIZE}].")
    load_state(vq, state, vq_layout(vq), path)
    return vq
