"""Counts what steps did and writes what a run leaves to read."""
