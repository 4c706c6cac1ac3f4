"""Tokenizers, which map pixels to latents and tokens, and back."""
