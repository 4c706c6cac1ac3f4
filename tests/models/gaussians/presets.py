"""One size, of which nothing was published."""

from __future__ import annotations

from tokenbridge.weights.published import OFFICIAL, Preset, SamplingRecipe

from .sampling import GaussiansSampling

PRESETS = {
    "gaussians-s": Preset(
        name="gaussians-s",
        model={"latent_size": 16, "num_channels": 16, "num_classes": 1000},
        num_parameters=1001 * 2 * 16**3,
        sampling={OFFICIAL: SamplingRecipe(GaussiansSampling(temperature=0.9), "tests")},
    )
}
