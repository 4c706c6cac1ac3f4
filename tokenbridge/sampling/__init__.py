"""Sampling runs, which make many images with a model, in one or several processes, and can be resumed."""
