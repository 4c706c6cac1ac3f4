"""Result files: their schema, their comparison, and their tables."""
