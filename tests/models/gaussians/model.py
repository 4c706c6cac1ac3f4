"""The network and its loss. Shape letters: B batch, C channels, h, w latent height and width."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class Gaussians(ModelMixin, ConfigMixin):
    """A linear layer from the class to the mean and log deviation of every latent."""

    @register_to_config
    def __init__(self, latent_size: int, num_channels: int, num_classes: int) -> None:
        super().__init__()
        self.latent_size, self.num_classes = latent_size, num_classes
        self.shape = (num_channels, latent_size, latent_size)
        self.output = nn.Linear(num_classes, 2 * num_channels * latent_size**2)

    def forward(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation, each [B, C, h, w], for labels [B]."""
        one_hot = nn.functional.one_hot(labels.to(self.device), self.num_classes).to(self.dtype)
        mean, log_deviation = self.output(one_hot).unflatten(1, (2, *self.shape)).unbind(1)
        return mean, log_deviation.exp()


def gaussians_loss(model: Gaussians, latents: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log likelihood of latents [B, C, h, w], a scalar in nats per latent."""
    mean, deviation = model(labels)
    return -torch.distributions.Normal(mean, deviation).log_prob(latents).mean()
