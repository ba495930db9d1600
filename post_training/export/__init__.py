"""Writes a model for other libraries and compares its logits."""
