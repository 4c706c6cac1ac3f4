"""Sampling runs: a model by name, many images, many processes, resumable."""
