"""A small convolutional classifier: the feature extractor of the tiny tier, where no Inception weights can be had.

Its scores are named after it (`FID-digits`, ...) and never called FID: they can be compared with one another, not
with published numbers.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class Classifier(ModelMixin, ConfigMixin):
    """Three convolutions with stride 2, a linear feature layer, a linear output layer.

    Args:
        image_size: height and width of the images, a multiple of 8.
        in_channels: channels of the images.
        num_classes: number of classes.
        width: channels of the first convolution; doubled by each of the next two.
        num_features: size of the feature vector that the Fréchet distance is computed on.
        dropout: before the output layers, in training.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 1,
        num_classes: int = 10,
        width: int = 24,
        num_features: int = 64,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        widths = (in_channels, width, 2 * width, 4 * width)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, kernel_size=5, stride=2, padding=2) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.to_features = nn.Linear(widths[-1] * (image_size // 8) ** 2, num_features)
        self.to_logits = nn.Linear(num_features, num_classes)
        self.dropout = dropout

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, num_features] and logits [B, num_classes] of images [B, C, H, W] in [-1, 1]."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.silu(norm(convolution(x)))
        x = F.dropout(x.flatten(1), self.dropout, self.training)
        features = F.silu(self.to_features(x))
        return features, self.to_logits(F.dropout(features, self.dropout, self.training))


def classifier_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the class labels, in nats, with a little label smoothing."""
    _, logits = model(images)
    return F.cross_entropy(logits, labels, label_smoothing=0.05)
