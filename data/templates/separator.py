"""The token between documents.

It stands at the end of every document, is never trained, and no message can contain it: it is not
written by the template, does not end a turn, and a row whose text holds it is refused. Documents do
not see each other in any case; the separator keeps them apart for everything that reads packs
without position ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO, NONE = "auto", "none"
# Tokens that model families keep for filling: Qwen, Llama 3 (and, of its base models and Llama 4, the
# text's end), DeepSeek, Gemma, Llama 2 and Mistral.
PLACEHOLDERS = (
    "<|endoftext|>",
    "<|finetune_right_pad_id|>",
    "<|end_of_text|>",
    "<｜▁pad▁｜>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<unk>",
)


def choose_separator(
    tokenizer: PreTrainedTokenizerBase, choice: str, template: str, rendered: str
) -> int | None:
    """The id of the separator.

    Args:
        tokenizer: The tokenizer.
        choice: ``auto``, ``none``, or the text of a token.
        template: Source of the chat template.
        rendered: A rendered conversation, with whatever the template writes by variables.

    Returns:
        The token id; None without a separator.

    Raises:
        DataError: the chosen token is not in the tokenizer, or the template writes it.
    """
    if choice == NONE:
        return None
    by_text = {
        token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()
    }

    def is_free(text: str) -> bool:
        return text not in template and text not in rendered

    if choice != AUTO:
        if choice not in by_text:
            raise DataError(
                f"--separator {choice}: not a special token of the tokenizer. "
                f"It has: {', '.join(list(by_text)[:20])}."
            )
        if not is_free(choice):
            raise DataError(
                f"--separator {choice}: the chat template writes this token inside conversations. "
                "Choose another, or --separator none."
            )
        return by_text[choice]
    reserved = [text for text in by_text if "reserved" in text.lower() or "pad" in text.lower()]
    pad = tokenizer.pad_token
    own = [pad] if isinstance(pad, str) and pad != tokenizer.eos_token else []
    for text in (*own, *PLACEHOLDERS, *reserved):
        if text in by_text and text != tokenizer.eos_token and is_free(text):
            return by_text[text]
    return None
