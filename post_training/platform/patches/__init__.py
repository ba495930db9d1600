"""How a function takes the place of another library's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def in_place_of(*places: tuple[Any, str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that puts a function into places where another library looks one up.

    Args:
        places: an owner (a module or class) and a name each. What stands in the first is what is replaced;
            the new function gets it as its first argument. It is left in `__wrapped__`.
    """
    owner, name = places[0]
    original = getattr(owner, name)
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)

    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        for owner, name in places:
            setattr(owner, name, staticmethod(replacement) if is_static else replacement)
        return replacement

    return put
