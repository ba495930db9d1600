"""Rows and template as TRL takes them, which masks answers by generation blocks alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\\n' }}{%- else %}{{ message.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def dataset_of(path: Path) -> Any:
    """The rows of a jsonl file with `question` and `answer`, as a dataset of conversations."""
    import datasets

    datasets.disable_progress_bars()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    roles = {"question": "user", "answer": "assistant"}
    return datasets.Dataset.from_list(
        [{"messages": [{"role": r, "content": row[k]} for k, r in roles.items()]} for row in rows]
    )
