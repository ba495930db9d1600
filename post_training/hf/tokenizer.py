"""The tokenizer of a run: the one that tokenizer.json says, whatever class the configuration names.

`AutoTokenizer` of transformers 5 builds normalizer and pre-tokenizer anew from the class that
tokenizer_config.json or the `model_type` of config.json names, and takes only the vocabulary from
tokenizer.json: a Mistral file under `qwen2` writes "Two plus two" as "Twoplustwo". So where there is a
tokenizer.json it is read as it is, and what came of it is compared with what `tokenizers` reads itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from textwrap import shorten
from typing import Any

from tokenizers import Tokenizer

from post_training.errors import SetupError
from post_training.files import json_object
from post_training.hf.folder import TOKENIZER_FILES, local_tokenizer_folder

FILE = "tokenizer.json"
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
# Where rebuilt parts of tokenizers differ: spaces, line breaks, digits, contractions, accents (composed
# and not), scripts without spaces, code.
PROBES = (
    "Two plus two",
    " one  two   three\tfour ",
    "line\nline\r\n\n  indented\n\n\n",
    "1 22 333 4444 55555 3.14 10,000",
    "It's don't WE'LL they'RE we\u2019re",
    "cafe\u0301 café naïve \u212b \ufb01ne ½",
    "東京に行く 한국어 العربية ไทย русский",
    "a\u00a0b\u200bc 😀👩\u200d💻",
    "def f(x):\n    return x[0]**2 # !?...---===//\n",
    '{"name": "f", "arguments": {"x": [1, -2]}} <b>x</b> $\\frac{a}{b}$ UPPER lower MiXed snake_case',
    "▁under Ġbyte <0x0A> <unk> <s>",
)


def load_tokenizer(args: argparse.Namespace) -> Any:
    """Load the HuggingFace tokenizer of `--hf-tokenizer`, else of `--hf-model`.

    Raises:
        SetupError: neither is given, or there is no tokenizer there.
    """
    flag = "--hf-tokenizer" if args.hf_tokenizer else "--hf-model"
    name = args.hf_tokenizer or args.hf_model
    if name is None:
        raise SetupError("--hf-tokenizer is missing: a model made from Megatron flags has none")
    return open_tokenizer(name, flag, trust_remote_code=args.trust_remote_code)


def open_tokenizer(name: str, flag: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a HuggingFace folder or hub name.

    Its ids are those of `tokenizers.Tokenizer.from_file(tokenizer.json)` with the special tokens of the
    configuration; without a tokenizer.json they are those of the class that transformers chooses.

    Args:
        name: the folder or name.
        flag: how the user gave it, for messages.
        trust_remote_code: run a class that the folder brings along, where it has no tokenizer.json.

    Raises:
        SetupError: there is no tokenizer, or its ids would not be those of its file.
    """
    from transformers import AutoTokenizer

    files = [file for file in TOKENIZER_FILES if not file.startswith("*")][:4]
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        raise SetupError(f"{flag} {name}: holds no tokenizer (none of {', '.join(files)})")
    try:
        folder = local_tokenizer_folder(name)
        if not (folder / FILE).is_file():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            _check_vocabulary(tokenizer, f"{flag} {name}")
            return tokenizer
        tokenizer = _of_file(folder)
        tokenizer.name_or_path = name
        own = Tokenizer.from_file(str(folder / FILE))
        _check_vocabulary(tokenizer, f"{flag} {name}")
        _check_added(tokenizer, own, folder, f"{flag} {name}")
        text = first_difference(tokenizer, own)
    except SetupError:
        raise
    except Exception as error:  # `tokenizers` raises no narrower one
        found = (
            "not a folder" if not Path(name).is_dir() else "no tokenizer that transformers can read"
        )
        detail = shorten(" ".join(str(error).split()) or type(error).__name__, 300)
        raise SetupError(f"{flag} {name}: {found} ({detail})") from error
    if text is not None:
        raise SetupError(
            f"{flag} {name}: transformers and the folder's {FILE} give other ids for {text!r}; which of "
            f"them the model knows is not known: leave only special tokens in tokenizer_config.json"
        )
    return tokenizer


def first_difference(tokenizer: Any, own: Tokenizer) -> str | None:
    """The first text that a tokenizer gives other ids than its file; None where there is none.

    Args:
        tokenizer: as transformers made it.
        own: what `tokenizers` reads from its tokenizer.json; it gets the configuration's special tokens.
    """
    own.no_padding()
    own.no_truncation()
    added = [token for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    own.add_tokens(added)
    around = [f"a {token} b{token}{token}\n c" for token in added]
    for text in (*PROBES, *around):
        for with_special in (False, True):
            found = tokenizer(text, add_special_tokens=with_special)["input_ids"]
            if found != own.encode(text, add_special_tokens=with_special).ids:
                return text
    return None


def _of_file(folder: Path) -> Any:
    """The tokenizer of a folder's tokenizer.json, with the special tokens that the configuration names.

    Where that names none, they are those of the class that transformers would take, if the file has them.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    # Templates write special tokens: they are never split, in training nor in answering.
    tokenizer.split_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens = False
    unnamed = [name for name in NAMED if name not in _configuration(folder)]
    if unnamed:
        by_class = AutoTokenizer.from_pretrained(folder)
        known = tokenizer.get_vocab()
        for name in unnamed:
            if getattr(by_class, name, None) in known:
                setattr(tokenizer, name, getattr(by_class, name))
    return tokenizer


def _check_vocabulary(tokenizer: Any, where: str) -> None:
    """Check that a tokenizer drops no letter of ASCII: it would be missing from all that is trained.

    Without its files transformers 5 makes one that drops every word.

    Raises:
        SetupError: it does.
    """
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    found = tokenizer(letters, add_special_tokens=False)["input_ids"]
    for letter, ids in zip(letters, found, strict=True):
        if not ids:
            raise SetupError(
                f"{where}: its vocabulary has no {letter!r} and nothing for what is unknown, so that it "
                f"would be dropped without a word: copy the whole folder, with its {FILE}"
            )


def _configuration(folder: Path) -> dict[str, Any]:
    """What the folder says of its tokenizer."""
    found: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            found |= json_object(folder / file)
    return found


def _check_added(tokenizer: Any, own: Tokenizer, folder: Path, where: str) -> None:
    """Check that a token which only the configuration has gets the id that this says.

    Raises:
        SetupError: it gets another.
    """
    known = {token.content for token in own.get_added_tokens_decoder().values()}
    for number, token in (_configuration(folder).get("added_tokens_decoder") or {}).items():
        text, found = token["content"], tokenizer.convert_tokens_to_ids(token["content"])
        if found != int(number) and text not in known:
            raise SetupError(
                f"{where}: tokenizer_config.json gives {text!r} the id {number}, but beside the vocabulary "
                f"of {FILE} it gets {found}"
            )
