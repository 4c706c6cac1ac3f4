"""The systems: TokenBridge, MAR, LlamaGen and GIVT, one folder each. README.md says how to add one."""
