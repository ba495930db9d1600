"""Row formats of a user's own: a function that ``--conversation-format package.module:function`` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.errors import RowError
from data.rows.conversation import Conversation
from data.rows.messages import conversation_from_messages
from data.rows.pictures import IMAGE_COLUMNS, column_pictures


@dataclass(frozen=True)
class UserConverter:
    """A user's function, whose results are checked like any row.

    Attributes:
        name: ``package.module:function``.
        function: The function.
    """

    name: str
    function: Callable[[Mapping[str, Any]], Any]

    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        """The conversation of a row.

        Raises:
            RowError: the function failed, or what it gave is no conversation.
        """
        try:
            result = self.function(row)
        except RowError:
            raise
        except Exception as error:
            raise RowError(
                "converter failed", f"{self.name}: {type(error).__name__}: {error}"
            ) from error
        if isinstance(result, Conversation):
            beside = result.pictures or None, "'pictures' of the conversation"
            checked = conversation_from_messages(
                result.messages, result.tools, None, self.name, beside
            )
            checked = replace(
                checked, variables=result.variables, open_end=checked.open_end or result.open_end
            )
            return _with_mask(checked, result.trained, self.name)
        if isinstance(result, (str, bytes)):
            kind = type(result).__name__
            raise RowError(
                "converter failed",
                f"{self.name} gave {kind}, expected a Conversation or a list of messages",
            )
        if isinstance(result, Mapping):
            beside = column_pictures(result, IMAGE_COLUMNS, False)
            return conversation_from_messages(
                result.get("messages"), result.get("tools"), pictures=beside
            )
        return conversation_from_messages(result, None, None, self.name)


def _with_mask(conversation: Conversation, trained: Any, name: str) -> Conversation:
    """The conversation with a converter's ``trained``; ``loss`` and ``weight`` fields still count.

    Raises:
        RowError: not one truth value a message, or one that trains another role.
    """
    messages = conversation.messages
    if not isinstance(trained, Sequence) or len(trained) != len(messages):
        found = len(trained) if isinstance(trained, Sequence) else type(trained).__name__
        raise RowError(
            "bad mask", f"{name}: 'trained' is {found}, expected {len(messages)}, one a message"
        )
    for number, (message, train) in enumerate(zip(messages, trained, strict=True), 1):
        if not isinstance(train, (bool, int)):
            raise RowError("bad mask", f"{name}: 'trained' of message {number} is {train!r}")
        if train and message["role"] != "assistant":
            raise RowError(
                "bad mask",
                f"{name}: message {number} is of role {message['role']}, only assistant messages "
                "can be trained",
            )
    both = [bool(a and b) for a, b in zip(trained, conversation.trained, strict=True)]
    return replace(conversation, trained=both)
