"""The systems: TokenBridge, MAR, LlamaGen and GIVT, with one folder for each. README.md says how to add one."""
