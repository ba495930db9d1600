"""Templates by the names that ROLL and LLaMA-Factory give them, for files and habits that come from there.

`native` is the tokenizer's own. A family's name is the tokenizer's own too, if that writes what the family
does around turns, and the family's plain form where the tokenizer has none: turns alone, without tools.
"""

from __future__ import annotations

from data.errors import DataError

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>"
    "\n\n{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_FAMILIES = {
    **dict.fromkeys(
        ("qwen", "qwen2_5", "qwen3", "qwen2_vl", "qwen3_vl"), ("<|im_start|>", _CHATML)
    ),
    "llama3": ("<|start_header_id|>", _LLAMA3),
}
NAMES = ("native", "chatml", *_FAMILIES)


def named_template(name: str, own: str | None) -> str | None:
    """The template of a name.

    Args:
        name: one of `NAMES`.
        own: the tokenizer's, if it has one.

    Returns:
        Jinja text; None for the tokenizer's own, which is not there.

    Raises:
        DataError: the tokenizer's template is of another family.
    """
    if name in ("native", "chatml"):
        return own if name == "native" else _CHATML
    mark, plain = _FAMILIES[name]
    if own and mark not in own:
        raise DataError(
            f"--chat-template {name}: the tokenizer's own template does not write {mark}: it is of "
            "another family. Leave the name out, or give a file."
        )
    return own or plain
