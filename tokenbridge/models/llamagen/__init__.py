"""LlamaGen: a causal transformer that generates the codes of a VQ tokenizer."""
