"""Saves, chooses and resumes checkpoints."""
