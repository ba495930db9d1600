"""Chat rows and the text they are made of, and what the right tokens and masks of a row are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
TEXT = """The quick brown fox jumps over the lazy dog. What is two plus two? It is four.
Why does the sky look blue? Because air scatters blue light more than red light does.
How many legs has a spider? Eight, and an ant has six. Name the capital of France: Paris.
Count from one to ten, then backwards. The user asks and the assistant answers in short words.
You are a helpful assistant who knows the planets: Mercury, Venus, Earth, Mars, Jupiter, Saturn.
"""
Row = dict[str, Any]


def make_rows(count: int, *, seed: int = 0) -> list[Row]:
    """Chat rows of varied length: some with a system prompt, some of several turns."""
    words = TEXT.split()

    def phrase(start: int, size: int) -> str:
        return " ".join(words[(start + i) % len(words)] for i in range(size))

    rows = []
    for number in range(seed * 1000, seed * 1000 + count):
        messages = []
        if number % 3 == 0:
            messages.append({"role": "system", "content": phrase(number, 4 + number % 5)})
        for turn in range(1 + number % 2):
            start = number * 5 + turn * 11
            messages += [
                {"role": "user", "content": phrase(start, 3 + (number * 7 + turn) % 6)},
                {"role": "assistant", "content": phrase(start + 3, 2 + (number * 11 + turn) % 13)},
            ]
        rows.append({"messages": messages})
    return rows


def write_rows(file: Path, rows: list[Row]) -> Path:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tokens_and_mask(row: Row, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a ChatML row must become, made by hand: nothing of the project's data layer is used.

    Returns:
        ids, int64 [tokens], and the mask, 1 at exactly what the assistant wrote and its stop token.
    """
    ids: list[int] = []
    mask: list[int] = []
    start, stop = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))

    def add(tokens: list[int], trained: bool) -> None:
        ids.extend(tokens)
        mask.extend([int(trained)] * len(tokens))

    for message in row["messages"]:
        trained = message["role"] == "assistant"
        add([start, *tokenizer.encode(message["role"] + "\n")], False)
        add([*tokenizer.encode(message["content"]), stop], trained)
        add(tokenizer.encode("\n"), False)
    return torch.tensor(ids), torch.tensor(mask)
