"""Puts the platform layer in place before a test module imports Megatron."""

import os

from post_training import platform

_before = dict(os.environ)
platform.apply()
# It made this process rank 0 of 1; processes that tests start must not inherit that.
for _name in os.environ.keys() - _before.keys():
    del os.environ[_name]
