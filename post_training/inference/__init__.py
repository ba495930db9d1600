"""One whole model in one process answers."""
