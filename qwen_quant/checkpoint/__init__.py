"""Checkpoints on disk: families, reading, writing, the audit and the manifest."""
