"""Slow, obvious oracles in numpy FP64."""
