"""The one exception that the data layer raises for anything a user can put right."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input data or a bad data flag.

    The message is complete on its own: it names the flag or ``file:line``, says what was found
    there, and says what would fix it. Callers print it and exit; a traceback adds nothing.
    """


class RowError(ValueError):
    """One row that cannot be used, with the reason under which it is counted.

    Args:
        reason: A short, stable name under which the row is counted, such as ``no assistant turn``.
        detail: What exactly was found in this row.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it can be sent between processes
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
