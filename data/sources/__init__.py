"""Finds files and hub datasets and cuts them into chunks."""
