"""Goes from packs to what a pipeline stage computes on."""
