"""Resolves the model's configuration, a configuration file and the command line into one namespace."""
