"""Recipes of the scales: which models there are, and how they are trained and sampled."""
