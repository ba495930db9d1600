"""Trains low-rank factors (LoRA) beside the frozen matrices of a model."""
