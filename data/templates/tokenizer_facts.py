"""What the data layer has to know about a HuggingFace tokenizer: template, special tokens, hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import DataError
from data.templates.named import NAMES, named_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def template_source(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    """The chat template: a file, a name (of the tokenizer's, or of `named.py`), Jinja text, or its own.

    Raises:
        DataError: there is none, or the file holds none.
    """
    theirs = tokenizer.chat_template
    own = theirs.get("default") if isinstance(theirs, dict) else theirs
    if chat_template is not None:
        if isinstance(theirs, dict) and chat_template in theirs:
            return str(theirs[chat_template])
        if "{" in chat_template:
            return chat_template
        if chat_template in NAMES and (found := named_template(chat_template, own)):
            return found
    if chat_template is not None and chat_template not in NAMES:
        path = Path(chat_template).expanduser()
        if not path.is_file():
            names = ", ".join(theirs) if isinstance(theirs, dict) else "none"
            raise DataError(
                f"--chat-template {chat_template}: no such file, and no template of the tokenizer "
                f"has this name (it has: {names}; others are {', '.join(NAMES)})."
            )
        return _read_template(path)
    if not own:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template. Pass --chat-template "
            "FILE with the template of the model's family."
        )
    return str(own)


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            text = json.loads(text)["chat_template"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        found = "no key chat_template" if isinstance(error, LookupError) else str(error)[:200]
        raise DataError(
            f"--chat-template {path}: holds no template ({found}). Expected Jinja text in UTF-8, or "
            'a .json file with the key "chat_template".'
        ) from error
    if not isinstance(text, str):
        raise DataError(f"--chat-template {path}: chat_template is no text. Give one template.")
    return text


def backend_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """The JSON of the fast tokenizer behind a HuggingFace tokenizer.

    Raises:
        DataError: it is a slow tokenizer, which cannot tell where in the text a token lies.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} is a slow one, which gives no character "
            "offsets. Use the model's fast tokenizer (tokenizer.json)."
        )
    return str(backend.to_str())


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Names and texts of special tokens, as templates use them: ``eos_token`` and so on."""
    named = tokenizer.special_tokens_map.items()
    return {name: str(value) for name, value in named if isinstance(value, str)}


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, ...], dict[int, str]]:
    """Texts of the special tokens, and ids and texts of all added tokens."""
    added = tokenizer.added_tokens_decoder
    special = [token.content for token in added.values() if token.special]
    named = special_tokens(tokenizer).values()
    texts = tuple(dict.fromkeys([*special, *named]))
    return texts, {token_id: token.content for token_id, token in added.items()}


def text_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], int | None]:
    """The token ids that the tokenizer puts before a text, and the one that ends a text, if any."""
    with_own = tokenizer("a").input_ids
    bare = tokenizer("a", add_special_tokens=False).input_ids
    before = next((n for n in range(len(with_own)) if with_own[n : n + len(bare)] == bare), 0)
    return tuple(with_own[:before]), tokenizer.eos_token_id


def text_hash(*texts: str) -> str:
    """A short hash of some texts."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
