"""Training: one loop for every model, and the models of a scale."""
