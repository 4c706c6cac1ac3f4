"""MAR: a masked transformer whose head draws a position's latent by diffusion."""
