"""The regression gate, which compares what this code computes with the stored references."""
