"""The recipes of all scales: their models, and how these are trained and sampled."""
