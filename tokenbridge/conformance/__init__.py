"""Conformance with the official code: golden cases are run, and each of their outputs is judged."""
