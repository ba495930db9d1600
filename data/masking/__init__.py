"""Finds, and proves, what the assistant wrote."""
