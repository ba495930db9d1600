"""Loads pictures and prepares them for a processor."""
