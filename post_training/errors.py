"""What a user got wrong, told in one message before any process group starts."""

from __future__ import annotations


class SetupError(ValueError):
    """A run that cannot work as asked.

    The message names the flag or file, what was found, and what would fix it.
    """


class RunStopped(RuntimeError):
    """A run that ends itself: raised on every rank at the same place, told once, exit status 1.

    The message says what was found, in which step, and how to continue.
    """
