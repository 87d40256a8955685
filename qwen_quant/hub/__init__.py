"""Talking to the model hub."""
