"""What of a row was read: nothing that a row holds may get lost without a word.

Converters read a row through ``Columns``, which remembers what they asked for. The rest is named:
columns by their names, fields inside of messages with a prefix, as in ``message.refusal``,
``part.cache_control`` (of content in parts) and ``call.index``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from data.errors import RowError
from data.rows.conversation import Conversation

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# What is told of a row rather than said in it; it comes last in messages.
_METADATA = frozenset(
    "id uuid uid idx index __index_level_0__ source dataset dataset_name data_source origin url split "
    "subset category task type kind language lang license score rating quality model generator "
    "timestamp date created_at metadata meta num_turns num_tokens prompt_id conversation_id "
    "message_id parent_id row_id hash tags".split()
)


class Columns(dict[str, Any]):
    """A mapping that remembers which of its keys were read.

    Args:
        row: What it holds.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key, which counts as read."""
        self.asked.add(name)
        return super().get(name, default)

    def unread(self, said: Iterable[Any] = ()) -> list[str]:
        """Keys that were not read, but for empty values and such as were read elsewhere.

        Args:
            said: Further values that are known to be in use.
        """
        left = [(k, v) for k, v in self.items() if k not in self.asked and not _is_empty(v)]
        if not left:
            return []
        known = [value for key, value in self.items() if key in self.asked]
        # A copy of what is read, such as a prompt column beside the messages, loses nothing.
        known += said
        return [str(key) for key, value in left if not any(_same(value, other) for other in known)]


def without(row: Mapping[str, Any], ignored: Sequence[str]) -> Mapping[str, Any]:
    """A row without the columns that are to be ignored."""
    return {k: v for k, v in row.items() if k not in ignored} if ignored else row


def read_all(
    row: Mapping[str, Any],
    convert: Callable[[Mapping[str, Any]], Conversation],
    ignored: Sequence[str],
    strict: bool,
    tracked: bool = True,
) -> Conversation:
    """Convert a row, and see what of it was not read.

    Args:
        row: The row.
        convert: Makes a conversation of it.
        ignored: Names of columns and fields that may be left out.
        strict: Whether everything else has to be read.
        tracked: Whether the columns that ``convert`` reads can be told.

    Returns:
        The conversation; ``unread`` names what nobody reads.

    Raises:
        RowError: the row cannot be used, or holds what must not be passed over.
    """
    row = without(row, ignored)
    if tracked:
        columns = Columns(row)
        conversation = convert(columns)
        left = columns.unread(
            message["content"] for message in conversation.messages if message.get("content")
        )
        names = (*left, *conversation.unread)
    else:
        conversation = convert(row)
        names = conversation.unread
    if not names:
        return conversation
    return replace(conversation, unread=require_read(names, ignored, strict))


def require_read(unread: Sequence[str], ignored: Sequence[str], strict: bool) -> tuple[str, ...]:
    """The names of what nobody reads, without those that may be left out.

    Raises:
        RowError: there is something that must not be passed over; with ``strict`` anything.
    """
    names = tuple(name for name in unread if name not in ignored)
    for name in names:
        _refuse(name, strict)
    return names


def _refuse(name: str, strict: bool) -> None:
    kind, _, field = name.rpartition(".")
    if field in _MEDIA:
        raise RowError(
            "pictures or sound",
            f"{name!r} holds some, and nothing reads them there; --image-keys reads columns of pictures "
            f"for a model that sees, --ignore-columns {name} trains the text alone",
        )
    if kind == "call":
        raise RowError(
            "bad tool call",
            f"a call has the field {field!r}, which nobody reads; take it out, or pass "
            f"--ignore-columns {name}",
        )
    if strict:
        raise RowError(
            "unread column", f"nobody reads {name!r} (--strict-columns); see --ignore-columns"
        )


def list_unread(counts: Mapping[str, int]) -> str:
    """Names with their counts, in the order of the alphabet, metadata last."""
    names = sorted(counts, key=lambda name: (name.rpartition(".")[2] in _METADATA, name))
    return ", ".join(
        f"{name if name.isprintable() else repr(name)} {counts[name]:,}" for name in names
    )


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def _same(value: Any, other: Any) -> bool:
    # Numbers and truth values are alike by chance.
    return isinstance(value, (str, list, dict)) and type(value) is type(other) and value == other
