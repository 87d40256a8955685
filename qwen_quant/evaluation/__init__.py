"""Proof against BF16: perplexity and divergence."""
