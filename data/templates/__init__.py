"""Renders conversations, and learns what a template writes around turns."""
