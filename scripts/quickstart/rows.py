"""Training and held-out rows of the quickstart, which share no question."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from scripts.quickstart.conversations import KINDS, Conversation

TRAIN_ROWS = 16000
TEST_ROWS = 500


def make_rows(seed: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Draws the training and the held-out rows.

    Kinds take turns, so both splits hold them in equal parts. The held-out rows are drawn first, each
    with a content of its own; their contents are refused afterwards. No row comes twice.

    Args:
        seed: the only source of randomness.

    Returns:
        Training rows and held-out rows.
    """
    rng = random.Random(seed)
    names = list(KINDS)
    seen_test: set[tuple[object, ...]] = set()
    seen_rows: set[str] = set()

    def draw(number: int, *, held_out: bool) -> dict[str, object]:
        kind = names[number % len(names)]
        for _ in range(1000):
            conversation = KINDS[kind](rng)
            content = (kind, *conversation.content)
            row = _to_row(kind, conversation)
            text = json.dumps(row)
            if content in seen_test or text in seen_rows:
                continue
            seen_rows.add(text)
            if held_out:
                seen_test.add(content)
            return row
        raise ValueError(f"the kind {kind!r} has too few different conversations for so many rows")

    test = [draw(number, held_out=True) for number in range(TEST_ROWS)]
    train = [draw(number, held_out=False) for number in range(TRAIN_ROWS)]
    rng.shuffle(train)
    return train, test


def _to_row(kind: str, conversation: Conversation) -> dict[str, object]:
    messages = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    for user, assistant in conversation.turns:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return {"kind": kind, "messages": messages}


def write_jsonl(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Writes one JSON object a line, UTF-8, with a newline after each."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
