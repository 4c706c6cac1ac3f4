"""MAR: masked autoregressive generation of continuous latents with a diffusion head (arXiv 2406.11838).

TokenBridge took its backbone from MAR, so the two share it. The head is a small network that denoises the vector of one
position, given the context z of that position. Official code: LTH14/mar at fe470ac, models/mar.py and
models/diffloss.py. Ours differs in structure and gives the same numbers: positions are index tensors of static shape,
the loss is computed on masked positions only, and what the diffusion steps of a position share is computed once.

With per-image randomness, every image has a stream of its own, seeded with (seed, image index). The stream gives the
image's order and then, iteration by iteration, the noise of the predicted positions, so an image does not depend on its
batch. The official code draws from one global stream. In each iteration it first draws the initial noise [N, C] of all
predicted positions, row by row of the batch and rising within a row. Then it draws the noise of every step, even that
of the last step, which is multiplied by 0. With guidance it draws noise for both halves, of which the second has no
effect.

Shape letters: B batch, L positions, V visible positions, K positions of an iteration or a loss, N positions of any
image, C channels of a position (latent channels * patch_size ** 2), D backbone width, W head width, S diffusion steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tokenbridge.models.layers import initialise, modulate, take
from tokenbridge.models.mar.diffusion import NUM_TIMESTEPS, Diffusion, diffusion_process
from tokenbridge.models.masked import BackboneConfig, MaskedBackbone
from tokenbridge.models.masked_sampling import random_orders, training_mask_count
from tokenbridge.utils.errors import UserError

NUM_FREQUENCIES = 128  # of the timestep embedding, which has a cosine and a sine of each
MAX_PERIOD = 10_000


# ------------------------------------------------------------------------------------------------------ head


class TimestepEmbedding(nn.Module):
    """Two linear layers applied to cosines and sines of the timestep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return the embeddings [..., W] of timesteps [...] in 0 .. 999."""
        return self.mlp(sinusoid(timesteps).to(next(self.parameters()).dtype))


def sinusoid(timesteps: Tensor) -> Tensor:
    """Return cosines and then sines of timesteps [...] at falling frequencies, float32 [..., 256]."""
    # The official code computes in float32 throughout: at t = 999, rounding a frequency changes the fourth digit.
    exponents = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[..., None].float() * torch.exp(-math.log(MAX_PERIOD) * exponents / NUM_FREQUENCIES)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResidualBlock(nn.Module):
    """Two linear layers that the condition modulates (adaLN-zero)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Apply to x [N, W] under condition [N, W]."""
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class OutputLayer(nn.Module):
    """A LayerNorm without weights, which the condition modulates, and a linear layer (DiT's final layer)."""

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, num_outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Apply to x [N, W] under condition [N, W]."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiffusionHead(nn.Module):
    """A network that predicts the noise in a position's vector and the variance of a step (models/diffloss.py).

    Module names follow the official checkpoints.

    Args:
        num_channels: C.
        context_width: D.
        width: W.
        depth: number of residual blocks.
    """

    def __init__(self, num_channels: int, context_width: int, width: int, depth: int) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.time_embed = TimestepEmbedding(width)
        self.cond_embed = nn.Linear(context_width, width)
        self.input_proj = nn.Linear(num_channels, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = OutputLayer(width, 2 * num_channels)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Return the predicted noise and the variance values, [N, 2C] (see `Diffusion.reverse`).

        Args:
            x: noisy vectors [N, C].
            timesteps: [N], timesteps of the whole process in 0 .. 999.
            context: [N, D].
        """
        return self.denoise(x, self.time_embed(timesteps) + self.cond_embed(context))

    def denoise(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return the output [N, 2C] for x [N, C] and the sum [N, W] of embedded timestep and context."""
        x = self.input_proj(x.to(condition.dtype))
        for block in self.res_blocks:
            x = block(x, condition)
        return self.final_layer(x, condition)

    def sample(
        self, process: Diffusion, context: Tensor, noise: Tensor, *, guidance: float = 1.0, temperature: float = 1.0
    ) -> Iterator[Tensor]:
        """Yield the vectors, float32 [N, C], after each diffusion step; the last ones are the sample.

        The context is embedded once for all steps, and the timesteps are embedded once for all rows.

        Args:
            process: the diffusion process, whose S steps are run from the last to the first.
            context: [N, D]; with guidance [2N, D], where the first half is computed with the class and the second
                half without it.
            noise: standard normal [1 + S, N, C]: the initial x, and then the noise of every step.
            guidance: guidance scale, which has no effect on a context [N, D].
            temperature: multiplies the noise of the steps. Quirk kept: it does not multiply the initial noise.
        """
        times = self.time_embed(process.timesteps)
        embedded = self.cond_embed(context)
        x = noise[0]
        guided = len(context) > len(x)
        for t, step_noise in zip(reversed(range(process.num_steps)), noise[1:], strict=True):
            output = self.denoise(x.repeat(2, 1) if guided else x, times[t] + embedded)
            x = process.step(x, t, guide(output, guidance) if guided else output, step_noise, temperature)
            yield x


def guide(output: Tensor, guidance: float) -> Tensor:
    """Mix outputs [2N, 2C], the first half of which has the class and the second half not, to guided ones [N, 2C].

    Guidance mixes only the predicted noise. The variance values are those with the class (`forward_with_cfg`).
    """
    conditional, unconditional = output.chunk(2)
    noise, variance = conditional.chunk(2, dim=-1)
    unconditional_noise = unconditional.chunk(2, dim=-1)[0]
    return torch.cat([unconditional_noise + guidance * (noise - unconditional_noise), variance], dim=-1)


# ----------------------------------------------------------------------------------------------------- model


class MAR(ModelMixin, ConfigMixin):
    """Class-conditional generator of continuous latents.

    Args:
        latent_size: height and width of the latents, a multiple of `patch_size`; L = (latent_size / patch_size) ** 2.
        num_channels: number of channels of the latents.
        patch_size: height and width of the square of latents that forms one position.
        width: width of the encoder.
        num_heads: number of attention heads of the encoder.
        num_buffer: number of class tokens before the positions.
        norm_eps: epsilon of the backbone's LayerNorms; 1e-6 in the official presets.
        decoder_width: width of the decoder; `width` if None.
        decoder_num_heads: number of attention heads of the decoder; `num_heads` if None.
        mlp_ratio: hidden width of the backbone's MLPs, relative to their input width.
    """

    @register_to_config
    def __init__(
        self,
        latent_size: int = 16,
        num_channels: int = 16,
        num_classes: int = 1000,
        patch_size: int = 1,
        width: int = 1024,
        encoder_depth: int = 16,
        decoder_depth: int = 16,
        num_heads: int = 16,
        num_buffer: int = 64,
        head_width: int = 1024,
        head_depth: int = 3,
        norm_eps: float = 1e-6,
        dropout: float = 0.1,
        decoder_width: int | None = None,
        decoder_num_heads: int | None = None,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if latent_size % patch_size:
            raise UserError(f"Latents of size {latent_size} have no whole number of patches of size {patch_size}.")
        self.num_classes = num_classes
        self.latent_size = latent_size
        self.patch_size = patch_size
        self.num_channels = num_channels * patch_size**2  # C
        self.backbone = MaskedBackbone(
            BackboneConfig(
                num_positions=(latent_size // patch_size) ** 2,
                num_channels=self.num_channels,
                num_classes=num_classes,
                width=width,
                encoder_depth=encoder_depth,
                decoder_depth=decoder_depth,
                num_heads=num_heads,
                num_buffer=num_buffer,
                decoder_width=decoder_width,
                decoder_num_heads=decoder_num_heads,
                mlp_ratio=mlp_ratio,
                norm_eps=norm_eps,
                dropout=dropout,
            )
        )
        self.head = DiffusionHead(self.num_channels, decoder_width or width, head_width, head_depth)
        initialise(self)
        for layer in self.head.time_embed.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.final_layer.linear.weight)

    @property
    def num_positions(self) -> int:
        """L, the number of positions of an image."""
        return self.backbone.num_positions

    def to_sequence(self, latents: Tensor) -> Tensor:
        """Cut latents [B, c, H, W] into patches [B, L, C] in raster order; C runs over c, then rows, then columns."""
        return F.pixel_unshuffle(latents, self.patch_size).flatten(2).transpose(1, 2)

    def to_latents(self, sequence: Tensor) -> Tensor:
        """Assemble latents [B, c, H, W] from patches [B, L, C]; this is the inverse of `to_sequence`."""
        side = self.latent_size // self.patch_size
        return F.pixel_shuffle(sequence.transpose(1, 2).unflatten(2, (side, side)), self.patch_size)

    def context(
        self,
        sequence: Tensor,
        visible: Tensor,
        labels: Tensor | None,
        /,
        *,
        dropped: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the context z of positions, [B, K, D] or [B, L, D], which is the input of the head.

        Args:
            sequence: [B, L, C], the latents; only those of visible positions matter.
            visible: [B, V], the visible positions, rising in each row.
            labels: [B]; None means that no image has a class.
            dropped: [B] bool, true for images whose label is ignored.
            positions: [B, K], the positions whose context is computed; all positions if None.
        """
        return self.backbone.context(take(sequence, visible), visible, labels, dropped=dropped, positions=positions)

    def forward(
        self,
        sequence: Tensor,
        labels: Tensor | None,
        visible: Tensor,
        positions: Tensor,
        t: Tensor,
        noise: Tensor,
        *,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """Return the diffusion loss of the latents at `positions`, each of which is noised R times.

        Args:
            sequence: [B, L, C], the true latents.
            labels: [B]; None means that no image has a class.
            visible: [B, V], the positions that the model sees, rising in each row.
            positions: [B, K], the positions to predict.
            t: [R, B, K], diffusion steps in 0 .. 999.
            noise: standard normal [R, B, K, C].
            dropped: [B] bool, true for images whose label is ignored.

        Returns:
            The squared error of the noise plus the variational bound (see `Diffusion.losses`), [R, B, K].
        """
        process = diffusion_process(NUM_TIMESTEPS, sequence.device)
        z = self.context(sequence, visible, labels, dropped=dropped, positions=positions)
        start = take(sequence, positions).expand_as(noise).flatten(0, 2)
        steps, noise_rows = t.flatten(), noise.flatten(0, 2)
        x = process.add_noise(start, noise_rows, steps)
        output = self.head(x, process.timesteps[steps], z.expand(len(t), *z.shape).flatten(0, 2))
        squared, bound = process.losses(start, x, noise_rows, steps, output)
        return (squared + bound).view_as(t)


def mar_loss(
    model: MAR,
    latents: Tensor,
    labels: Tensor,
    *,
    label_dropout: float = 0.1,
    num_loss_positions: int | None = None,
    num_noises: int = 4,
    mask_ratio_min: float = 0.7,
    mask_ratio_std: float = 0.25,
) -> Tensor:
    """Return the diffusion loss of the masked positions, a scalar: the mean over positions and noises.

    The masked positions, the dropped labels, the steps and the noise are drawn from torch's global generator. The
    official code also computes the loss of visible positions and leaves it out of the mean.

    Args:
        model: the model in training mode, in which it uses dropout.
        latents: [B, c, H, W], scaled to about unit variance.
        labels: [B].
        label_dropout: share of labels that are replaced by "no class", so that guidance works.
        num_loss_positions: number of masked positions of each image that the loss is computed on. They are chosen at
            random, so the gradient stays unbiased. None means all masked positions.
        num_noises: number of diffusion steps and noises for each context (the official `diffusion_batch_mul`).
        mask_ratio_min: see `training_mask_count`.
        mask_ratio_std: see `training_mask_count`.
    """
    batch, length, device = latents.shape[0], model.num_positions, latents.device
    order = random_orders(batch, length, device)
    num_masked = training_mask_count(length, ratio_min=mask_ratio_min, ratio_std=mask_ratio_std)
    visible = order[:, num_masked:].sort(dim=1).values
    num_predicted = num_masked if num_loss_positions is None else min(num_masked, num_loss_positions)
    positions = order[:, :num_predicted]
    dropped = torch.rand(batch, device=device) < label_dropout
    t = torch.randint(NUM_TIMESTEPS, (num_noises, batch, num_predicted), device=device)
    noise = torch.randn(*t.shape, model.num_channels, device=device)
    sequence = model.to_sequence(latents)
    return model(sequence, labels, visible, positions, t, noise, dropped=dropped).mean()
