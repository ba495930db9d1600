"""A training task of the user's own, in three methods, through the same loop, metrics and checkpoints."""
