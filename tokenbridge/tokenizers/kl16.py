"""KL-16, the VAE of LDM with MAR's weights, as diffusers' AutoencoderKL."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from tokenbridge.weights.official import Layout, ParamMapping
from tokenbridge.weights.torch_files import load_checkpoint

KL16 = "kl16"
KL16_SCALE = 0.2325  # factor of the latents before quantisation (engine_tokenbridge.py)


def load_kl16(path: Path | str) -> AutoencoderKL:
    """Load the published VAE (`kl16.ckpt`) into diffusers' AutoencoderKL, in evaluation mode.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is not a checkpoint of this VAE.
    """
    vae = create_kl16()
    load_checkpoint(vae, path, kl16_layout(vae), ema=False)
    return vae


def create_kl16(
    *,
    embed_dim: int = 16,
    ch: int = 128,
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
    num_res_blocks: int = 2,
    attn_resolutions: tuple[int, ...] = (16,),
    resolution: int = 256,
) -> AutoencoderKL:
    """Build KL-16, or another size of LDM's VAE, as diffusers' AutoencoderKL on the meta device.

    The arguments are those of the official Encoder (models/vae.py). The nominal `resolution`, not the size of an
    image, decides which levels of the encoder have attention. The decoder has attention only in the middle.
    """
    levels = range(len(ch_mult))
    down = [resolution // 2**i in attn_resolutions for i in levels]
    with torch.device("meta"):
        return AutoencoderKL(
            down_block_types=tuple("AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in down),
            up_block_types=("UpDecoderBlock2D",) * len(ch_mult),
            block_out_channels=tuple(ch * multiplier for multiplier in ch_mult),
            layers_per_block=num_res_blocks,
            latent_channels=embed_dim,
            norm_num_groups=32,
            sample_size=resolution,
            scaling_factor=KL16_SCALE,
        ).eval()


LDM_WORDS = (  # parts of names in diffusers and in LDM; they are replaced in this order
    ("down_blocks.", "down."),
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    (".resnets.", ".block."),
    (".attentions.", ".attn."),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".conv_norm_out.", ".norm_out."),
    (".group_norm.", ".norm."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".proj_out."),
)


def kl16_layout(vae: AutoencoderKL) -> Layout:
    """Return the layout of `kl16.ckpt` in diffusers' AutoencoderKL."""
    mappings: dict[str, ParamMapping] = {}
    last = len(vae.config.block_out_channels) - 1
    for name, parameter in vae.named_parameters():
        # LDM counts the decoder's levels from the finest, diffusers in the order in which they run.
        official = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)
        for ours, theirs in LDM_WORDS:
            official = official.replace(ours, theirs)
        # The attention projections of LDM are 1 × 1 convolutions.
        ones = (1, 1) if re.search(r"\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", official) else ()
        assert official not in mappings, "two parameters share an official name"
        mappings[official] = ParamMapping(name, (*parameter.shape, *ones))
    return Layout(mappings, "KL-16")
