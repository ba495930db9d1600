"""Keeps the processes of a run alive together, and ends them together."""
