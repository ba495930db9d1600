"""Replaces what Megatron and torch do wrongly or not at all when they write and read checkpoints."""
