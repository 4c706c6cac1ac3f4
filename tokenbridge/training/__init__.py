"""Training: one loop for every model, and the training of a scale's models in the right order."""
