"""The TokenBridge generator: masked backbone, head, quantizer and channel order in one model.

Official code: models/tokenbridge.py, class `TokenBridge`. Ours differs in structure and gives the same numbers: the
masked positions of a batch are index tensors of static shape, and the head is a module of its own.

Shape letters: B batch, L positions, n visible positions, C channels, H height, W width, V levels, K positions with a
loss, D context width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from tokenbridge.models.layers import initialise, take
from tokenbridge.models.masked import BackboneConfig, MaskedBackbone
from tokenbridge.models.masked_sampling import random_orders, training_mask_count
from tokenbridge.models.tokenbridge.heads import ARHead, FirstElement, HeadConfig, ParallelHead
from tokenbridge.models.tokenbridge.orders import OFFICIAL_CHANNEL_ORDER, inverse
from tokenbridge.tokenizers.quantizer import GAUSSIAN_RANGE, GAUSSIAN_SIGMAS, ScalarQuantizer, gaussian_quantizer
from tokenbridge.utils.errors import UserError

HEADS: dict[str, type[ARHead | ParallelHead]] = {"ar": ARHead, "parallel": ParallelHead}


class TokenBridge(ModelMixin, ConfigMixin):
    """Class-conditional generator of quantized latents.

    Args:
        latent_size: height and width of the latents; L = latent_size ** 2.
        num_channels: C.
        num_levels: V, the number of levels of the Gaussian quantizer.
        value_range: latents are clamped to ± this value (see `gaussian_quantizer`).
        num_sigmas: the quantizer's Gaussian is cut at ± this many deviations.
        channel_order: a permutation of the channels; `channel_order[i]` is generated as the i-th channel.
        width: width of the encoder.
        num_heads: number of attention heads of the encoder.
        num_buffer: number of class tokens before the positions.
        norm_eps: epsilon of the LayerNorms; 1e-6 in the official presets.
        decoder_width: width of the decoder; `width` if None.
        decoder_num_heads: number of attention heads of the decoder; `num_heads` if None.
        mlp_ratio: hidden width of every MLP in backbone and head, relative to its input width.
    """

    quantizer: ScalarQuantizer
    head: ARHead | ParallelHead

    @register_to_config
    def __init__(
        self,
        latent_size: int = 16,
        num_channels: int = 16,
        num_classes: int = 1000,
        num_levels: int = 64,
        value_range: float = GAUSSIAN_RANGE,
        num_sigmas: float = GAUSSIAN_SIGMAS,
        channel_order: tuple[int, ...] = OFFICIAL_CHANNEL_ORDER,
        head_type: Literal["ar", "parallel"] = "ar",
        width: int = 1024,
        encoder_depth: int = 16,
        decoder_depth: int = 16,
        num_heads: int = 16,
        num_buffer: int = 64,
        head_width: int = 1024,
        head_depth: int = 4,
        head_num_heads: int = 8,
        norm_eps: float = 1e-6,
        dropout: float = 0.1,
        decoder_width: int | None = None,
        decoder_num_heads: int | None = None,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if len(channel_order) != num_channels:
            raise UserError(f"The channel order has {len(channel_order)} entries for {num_channels} channels.")
        if head_type not in HEADS:
            raise UserError(f"Unknown head {head_type!r}; there are {', '.join(sorted(HEADS))}.")
        self.num_classes = num_classes
        self.latent_size = latent_size
        self.channel_order = tuple(channel_order)
        self.inverse_channel_order = inverse(self.channel_order)
        self.backbone = MaskedBackbone(
            BackboneConfig(
                num_positions=latent_size**2,
                num_channels=num_channels,
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
        self.head = HEADS[head_type](
            HeadConfig(
                num_channels=num_channels,
                num_levels=num_levels,
                context_width=decoder_width or width,
                width=head_width,
                depth=head_depth,
                num_heads=head_num_heads,
                mlp_ratio=mlp_ratio,
                norm_eps=norm_eps,
                dropout=dropout,
            )
        )
        initialise(self)
        self.quantizer = gaussian_quantizer(num_levels, value_range=value_range, num_sigmas=num_sigmas)

    @property
    def num_positions(self) -> int:
        """L, the number of positions of an image."""
        return self.backbone.num_positions

    @property
    def num_channels(self) -> int:
        """C, the number of channels of a position, each of which has one token."""
        return len(self.channel_order)

    def to_sequence(self, latents: Tensor) -> Tensor:
        """Flatten latents [B, C, H, W] to [B, L, C], with the positions in raster order."""
        return latents.flatten(2).transpose(1, 2)

    def to_latents(self, tokens: Tensor) -> Tensor:
        """Return the latents [B, C, H, W] that tokens [B, L, C] stand for."""
        values = self.quantizer.lookup(tokens).transpose(1, 2)
        return values.unflatten(2, (self.latent_size, self.latent_size))

    def context(
        self,
        tokens: Tensor,
        visible: Tensor,
        labels: Tensor | None,
        *,
        dropped: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the context z of positions, which is the input of the head.

        Args:
            tokens: [B, L, C]; only those of visible positions matter.
            visible: [B, n], the visible positions, rising in each row.
            labels: [B]; None means that no image has a class.
            dropped: [B] bool, true for images whose label is ignored.
            positions: [B, K], the positions whose context is computed; all positions if None.

        Returns:
            The context z, [B, K, D] or [B, L, D].
        """
        latents = self.quantizer.lookup(take(tokens, visible))
        return self.backbone.context(latents, visible, labels, dropped=dropped, positions=positions)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None,
        visible: Tensor,
        positions: Tensor,
        *,
        dropped: Tensor | None = None,
        first: FirstElement = "training-consistent",
    ) -> Tensor:
        """Return the logits of the tokens at `positions`, teacher-forced along the channels.

        Args:
            tokens: [B, L, C], the true tokens in the latents' channel order.
            labels: [B]; None means that no image has a class.
            visible: [B, n], the positions that the model sees, rising in each row.
            positions: [B, K], the positions to predict.
            dropped: [B] bool, true for images whose label is ignored.
            first: the first element of the AR head's sequence (see `ARHead.logits`).

        Returns:
            Logits [B, K, C, V], with the channels in generation order.
        """
        z = self.context(tokens, visible, labels, dropped=dropped, positions=positions)
        targets = take(tokens, positions)[..., self.channel_order]
        logits = self.head.logits(z.flatten(0, 1), targets.flatten(0, 1), first=first)
        return logits.unflatten(0, positions.shape)


def generator_loss(
    model: TokenBridge,
    latents: Tensor,
    labels: Tensor,
    *,
    label_dropout: float = 0.1,
    num_loss_positions: int | None = None,
    mask_ratio_min: float = 0.7,
    mask_ratio_std: float = 0.25,
) -> Tensor:
    """Return the mean cross-entropy of the masked positions' tokens, a scalar in nats per token.

    The masked positions and the dropped labels are drawn from torch's global generator.

    Args:
        model: the model in training mode, in which it uses dropout.
        latents: [B, C, H, W], scaled to about unit variance.
        labels: [B].
        label_dropout: share of labels that are replaced by "no class", so that guidance works.
        num_loss_positions: number of masked positions of each image that the loss is computed on. They are chosen at
            random, so the gradient stays unbiased. None means all masked positions, as in the official training.
        mask_ratio_min: see `training_mask_count`.
        mask_ratio_std: see `training_mask_count`.
    """
    batch, length = latents.shape[0], model.num_positions
    tokens = model.quantizer.nearest(model.to_sequence(latents))
    order = random_orders(batch, length, latents.device)
    num_masked = training_mask_count(length, ratio_min=mask_ratio_min, ratio_std=mask_ratio_std)
    visible = order[:, num_masked:].sort(dim=1).values
    num_predicted = num_masked if num_loss_positions is None else min(num_masked, num_loss_positions)
    positions = order[:, :num_predicted]
    dropped = torch.rand(batch, device=latents.device) < label_dropout
    logits = model(tokens, labels, visible, positions, dropped=dropped)
    targets = take(tokens, positions)[..., model.channel_order]
    return F.cross_entropy(logits.flatten(0, 2).float(), targets.flatten())
