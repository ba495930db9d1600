"""What goes to the workers that tokenise; plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from data.images.layout import ImageLayout
from data.masking.answers import LossOn, Reasoning
from data.rows.converters import FormatOptions

OnBadRow = Literal["error", "skip"]
Overlong = Literal["drop", "error", "trim-turns"]


@dataclass(frozen=True)
class TokenizeOptions:
    """Everything that the ids and masks of a row depend on; plain data, sent to workers.

    Attributes:
        tokenizer: The tokenizers library's JSON.
        special_tokens: Names and texts that templates may use, such as ``eos_token``.
        special: Texts of special tokens.
        added: Ids and texts of all added tokens.
        template: Jinja source.
        variables: Further template variables.
        day: What the template's clock says, as YYYY-MM-DD; empty where it has none.
        format: Name of the rows' format, resolved.
        mapping: Column names and converters for it.
        seq_length: Longest document.
        overlong: What happens to longer ones.
        on_bad_row: What happens to rows that cannot be used.
        reasoning: Which reasoning is trained.
        loss_on: Which turns are trained.
        trust_blocks: Whether a template's generation blocks are taken as they are.
        separator: Token id appended to every document, never trained; None for none.
        images: How pictures become tokens; None where the model reads text alone.
        no_images: Why it does.
        image_cache: Folder of embedded pictures; empty where none are kept.
        max_prompt_length: Most tokens before the first trained one; None for any number.
        text_prefix: Token ids that the tokenizer puts before a text, for raw text.
        text_end: Token id of the end of a text, for raw text; None where there is none.
    """

    tokenizer: str
    special_tokens: dict[str, str]
    special: tuple[str, ...]
    added: dict[int, str]
    template: str
    variables: dict[str, Any]
    format: str
    mapping: FormatOptions
    seq_length: int
    overlong: Overlong = "drop"
    on_bad_row: OnBadRow = "error"
    reasoning: Reasoning = "keep"
    loss_on: LossOn = "all"
    trust_blocks: bool = False
    separator: int | None = None
    text_prefix: tuple[int, ...] = ()
    text_end: int | None = None
    day: str = ""
    images: ImageLayout | None = None
    no_images: str = "a model of text cannot be trained on them"
    image_cache: str = ""
    max_prompt_length: int | None = None
