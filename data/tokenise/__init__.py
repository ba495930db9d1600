"""Turns rendered rows into ids and masks, in worker processes."""
