"""Scores of images: FID, Inception Score, precision, recall, KID, reconstruction."""
