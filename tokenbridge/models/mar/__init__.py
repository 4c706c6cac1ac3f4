"""MAR: a masked transformer with a head that draws the latent of a position by diffusion."""
