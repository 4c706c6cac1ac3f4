"""A small convolutional classifier: it extracts features at the small scales, where Inception's weights are missing.

Its scores are named after it (`FID-digits`, ...) and are never called FID, because they can be compared with one
another but not with published numbers.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class Classifier(ModelMixin, ConfigMixin):
    """Four convolutions, averaged over the image, and a linear output layer.

    The features are averages over positions, and the output layer acts on them directly, as in Inception, whose last
    pooling layer gives the features of FID. They say which strokes an image is made of, wherever these lie.

    Args:
        image_size: height and width of the images.
        in_channels: channels of the images.
        num_classes: number of classes.
        widths: channels of the convolutions; the last is the number of features.
        dropout: the dropout rate of the features in training.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 1,
        num_classes: int = 10,
        widths: tuple[int, ...] = (32, 64, 96, 96),
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, kernel_size=3 if i else 5, stride=1 if i % 2 else 2, padding=1 if i else 2)
            for i, (a, b) in enumerate(pairwise((in_channels, *widths)))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths)
        self.to_logits = nn.Linear(widths[-1], num_classes)
        self.dropout = dropout

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, widths[-1]] and logits [B, num_classes] of images [B, C, H, W] in [-1, 1]."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.silu(norm(convolution(x)))
        features = x.mean((2, 3))
        return features, self.to_logits(F.dropout(features, self.dropout, self.training))


def classifier_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of the class labels, in nats, with a little label smoothing."""
    _, logits = model(images)
    return F.cross_entropy(logits, labels, label_smoothing=0.05)
