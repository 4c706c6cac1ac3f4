"""LlamaGen: a causal transformer over the codes of a VQ tokenizer."""
