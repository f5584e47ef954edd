"""Checkpoints: names, safe reading, strict loading, writing for other code."""
