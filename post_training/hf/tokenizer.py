"""The tokenizer of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from textwrap import shorten
from typing import Any

from post_training.errors import SetupError


def load_tokenizer(args: argparse.Namespace) -> Any:
    """Load the HuggingFace tokenizer of `--hf-tokenizer`, else of `--hf-model`.

    Raises:
        SetupError: neither is given, or there is no tokenizer there.
    """
    flag = "--hf-tokenizer" if args.hf_tokenizer else "--hf-model"
    name = args.hf_tokenizer or args.hf_model
    if name is None:
        raise SetupError("--hf-tokenizer is missing: a model made from Megatron flags has none")
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        raise SetupError(f"{flag} {name}: holds no tokenizer (none of {', '.join(files)})")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # whatever the files made of transformers
        found = (
            "not a folder" if not Path(name).is_dir() else "no tokenizer that transformers can read"
        )
        detail = shorten(" ".join(str(error).split()) or type(error).__name__, 300)
        raise SetupError(f"{flag} {name}: {found} ({detail})") from error
