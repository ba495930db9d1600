"""The layers that keep documents apart."""
