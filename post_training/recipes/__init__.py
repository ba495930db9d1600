"""Reads recipes: files of flags, which may build on others, and the YAML of other systems."""
