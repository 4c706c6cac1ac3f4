"""GIVT: a causal transformer that generates continuous latents and has a Gaussian mixture as its output."""
