"""GIVT: a causal transformer over continuous latents, whose output is a Gaussian mixture."""
