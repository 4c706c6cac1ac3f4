"""The regression gate: this code against the stored references."""
