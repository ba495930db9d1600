"""Reads HuggingFace configurations, weights and tokenizers."""
