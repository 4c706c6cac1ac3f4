"""GIVT's VAE, a convolutional autoencoder with a Gaussian posterior.

Source: google-research/big_vision at 0127fb6, models/proj/givt (cnn.py, vae.py), after MaskGIT's VQ-GAN. diffusers'
autoencoders cannot compute it, because their residual blocks and their pooling differ. It has the interface of one,
so that `LatentTokenizer` accepts it: `encode` returns a posterior, and `decode` a sample.

Shape letters: B batch, C channels of the latents, H, W height and width of images, h, w of latents.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tokenbridge.data.images import bounded
from tokenbridge.weights.flax_files import load_tree, read_tree
from tokenbridge.weights.official import Layout, ParamMapping

ACTIVATIONS: dict[str, type[nn.Module]] = {"swish": nn.SiLU, "relu": nn.ReLU}


def group_norm(width: int) -> nn.GroupNorm:
    """Return a group normalisation with 32 groups and the epsilon of Flax."""
    return nn.GroupNorm(32, width, eps=1e-6)


class ResBlock(nn.Module):
    """A residual block of two convolutions, which may change the width."""

    def __init__(self, width_in: int, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            group_norm(width_in),
            activation(),
            nn.Conv2d(width_in, width, 3, padding=1, bias=False),
            group_norm(width),
            activation(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )
        self.mix = nn.Conv2d(width, width, 1, bias=False) if width != width_in else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x [B, C, H, W].

        Quirk kept: where the width changes, a projection of the BRANCH is added to the branch, not one of x (cnn.py,
        ResBlock), so that no path leads around the convolutions.
        """
        y = self.branch(x)
        return y + (x if self.mix is None else self.mix(y))


class GivtVAE(ModelMixin, ConfigMixin):
    """The autoencoder of images [B, 3, H, W] in [-1, 1], with latents [B, C, h, w].

    Args:
        latent_channels: C.
        width: channels that a multiplier of 1 stands for.
        width_multipliers: the width of each level over `width`, finest first. Every level but the last halves height
            and width.
        num_res_blocks: residual blocks of each level, and of the middle of the encoder and of the decoder.
        conv_downsample: whether a 4 × 4 convolution halves the size, instead of the mean of 2 × 2.
        unit_images: whether images are mapped to [0, 1] and back inside, and the posterior's log-variance is limited
            to [-30, 20] (official `malib_ckpt`; the published weights need it).
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        width: int = 128,
        width_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        image_channels: int = 3,
        activation: Literal["swish", "relu"] = "swish",
        conv_downsample: bool = False,
        unit_images: bool = True,
    ) -> None:
        super().__init__()
        self.unit_images = unit_images
        act = ACTIVATIONS[activation]
        widths = [width * multiplier for multiplier in width_multipliers]

        def blocks(width_in: int, width: int) -> list[nn.Module]:
            return [ResBlock(width if i else width_in, width, act) for i in range(num_res_blocks)]

        down: list[nn.Module] = [nn.Conv2d(image_channels, width, 3, padding=1, bias=False), *blocks(width, widths[0])]
        for finer, coarser in pairwise(widths):
            # At an odd edge the mean is taken over the pixels that exist.
            pool = nn.Conv2d(finer, finer, 4, 2, 1) if conv_downsample else nn.AvgPool2d(2, ceil_mode=True)
            down += [pool, *blocks(finer, coarser)]
        last = widths[-1]
        down += [*blocks(last, last), group_norm(last), act(), nn.Conv2d(last, 2 * latent_channels, 1)]
        self.encoder = nn.Sequential(*down)

        up: list[nn.Module] = [nn.Conv2d(latent_channels, last, 3, padding=1), *blocks(last, last), *blocks(last, last)]
        for coarser, finer in pairwise(reversed(widths)):
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(coarser, coarser, 3, padding=1), *blocks(coarser, finer)]
        up += [group_norm(widths[0]), act(), nn.Conv2d(widths[0], image_channels, 3, padding=1)]
        self.decoder = nn.Sequential(*up)

    def moments(self, images: Tensor) -> Tensor:
        """Return the posterior's mean and log-variance [B, 2 C, h, w]; the log-variance is not limited."""
        return self.encoder((images + 1) / 2 if self.unit_images else images)

    def encode(self, images: Tensor) -> AutoencoderKLOutput:
        """Return the posterior (`latent_dist`) of images [B, 3, H, W] in [-1, 1].

        diffusers limits its log-variance to [-30, 20], as the official code does with `malib_ckpt`.
        """
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(self.moments(images)))

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Return the images (`sample`) of latents [B, C, h, w], in [-1, 1]."""
        images = self.decoder(latents)
        return DecoderOutput(sample=bounded(2 * images - 1 if self.unit_images else images))


# --------------------------------------------------------------------------------- the published checkpoint


def create_givt_vae(**changes: Any) -> GivtVAE:
    """Build the published VAE, or one of other sizes, on the meta device, in evaluation mode."""
    with torch.device("meta"):
        return GivtVAE(**changes).eval()


def givt_vae_layout(vae: GivtVAE) -> Layout:
    """Return the layout of the official tensors. Flax numbers the modules of each kind in the order of their calls."""
    mappings: dict[str, ParamMapping] = {}
    for side in ("encoder", "decoder"):
        for theirs, ours, module in _numbered(f"cnn_{side}", side, vae.get_submodule(side)):
            if isinstance(module, ResBlock):
                # The projection of the branch is called last, so its name is Conv_2.
                parts = [*_numbered(theirs, f"{ours}.branch", module.branch)]
                if module.mix is not None:
                    parts.append((f"{theirs}/Conv_2", f"{ours}.mix", module.mix))
            else:
                parts = [(theirs, ours, module)]
            for part in parts:
                mappings |= _convolution_or_norm(*part)
    return Layout(mappings, "GivtVAE")


def _numbered(theirs: str, ours: str, modules: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """Return (official name, our name, module) of every module in a sequence that has parameters."""
    kinds: dict[type[nn.Module], str] = {nn.Conv2d: "Conv", nn.GroupNorm: "GroupNorm", ResBlock: "ResBlock"}
    counts: Counter[str] = Counter()
    named = []
    for name, module in modules.named_children():
        if (kind := kinds.get(type(module))) is not None:
            named.append((f"{theirs}/{kind}_{counts[kind]}", f"{ours}.{name}", module))
            counts[kind] += 1
    return named


def _convolution_or_norm(theirs: str, ours: str, module: nn.Module) -> dict[str, ParamMapping]:
    shape = tuple(module.get_parameter("weight").shape)
    if isinstance(module, nn.Conv2d):
        out, width, height, length = shape
        mappings = {f"{theirs}/kernel": ParamMapping(f"{ours}.weight", (height, length, width, out), kernel=True)}
    else:
        mappings = {f"{theirs}/scale": ParamMapping(f"{ours}.weight", shape)}
    if module.bias is not None:
        mappings[f"{theirs}/bias"] = ParamMapping(f"{ours}.bias", (shape[0],))
    return mappings


def load_givt_vae(path: Path | str, *, ema: bool = True) -> GivtVAE:
    """Load the published VAE (`vae_imagenet_2012_beta_5e-5_params`), in evaluation mode.

    Args:
        path: the published file, which is the msgpack of a whole training state, or an .npz file of the VAE's
            parameters.
        ema: whether to take the moving average of the weights from a training state, as the published configuration
            does, instead of the weights themselves.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is damaged, or its tensors do not fit; the message begins with the path.
    """
    vae, tree = create_givt_vae(), read_tree(path)
    if any(name.startswith(("ema_params/", "g_params/")) for name in tree):
        prefix = "ema_params/" if ema else "g_params/"
        # The training code names the parameters without `cnn_` (cnn.py, load).
        tree = {"cnn_" + n.removeprefix(prefix): value for n, value in tree.items() if n.startswith(prefix)}
    load_tree(vae, tree, givt_vae_layout(vae), path)
    return vae
