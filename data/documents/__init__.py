"""Stores, mixes and traces tokenised documents."""
