"""Models that transformers does not define, and the block-by-block skeleton of those it does."""
