"""What other readers make of an exported tokenizer, which is the base's own and cannot be changed."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from post_training.files import json_object
from post_training.hf.tokenizer import FILE, first_difference

# Classes that transformers 4.x does not have.
_NEWER = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend", "MistralCommonBackend")


def complaints(folder: Path) -> list[str]:
    """What readers trip over: other ids by `AutoTokenizer`, and what transformers 4.x cannot read."""
    found = []
    config = folder / "tokenizer_config.json"
    said = json_object(config) if config.is_file() else {}
    if said.get("tokenizer_class") in _NEWER or isinstance(said.get("extra_special_tokens"), list):
        found.append(
            "the base's tokenizer_config.json was written by transformers 5, and is copied as it is; "
            "transformers 4.x cannot read it"
        )
    if not (folder / FILE).is_file():
        return found
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = first_difference(tokenizer, Tokenizer.from_file(str(folder / FILE)))
    except Exception as error:  # noqa: BLE001 - whatever its class raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        found.append(f"AutoTokenizer cannot read the base's tokenizer ({reason}); {FILE} is right")
        return found
    if text is not None:
        found.append(
            f"AutoTokenizer makes it a {type(tokenizer).__name__}, which gives {text!r} other ids than "
            f"{FILE}, by which the model was trained; load it with PreTrainedTokenizerFast"
        )
    return found
