"""Conformance with the official code: golden cases are run, and every output is judged."""
