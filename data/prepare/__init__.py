"""Goes from flags to cached documents."""
