"""Tokenizers: pixels to latents to tokens, and back."""
