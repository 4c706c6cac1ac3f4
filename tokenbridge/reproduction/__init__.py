"""The paper's tables, rebuilt at a small scale or at the paper's own."""
