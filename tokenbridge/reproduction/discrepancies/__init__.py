"""Differences between the paper and its code, with both sides measured in one run."""
