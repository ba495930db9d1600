"""Turns a row of any format into one conversation."""
