"""Tokenizer folders of every make: are the ids those of tokenizer.json, or is the folder refused?

    python benchmarks/tokenizer_survey.py TOKENIZERS [--texts FILE.jsonl]     one line a folder, and sums

Each tokenizer below TOKENIZERS is put under every class name and `model_type`. Ids of the probes and of the
texts (fields of rows, joined) are compared with the `tokenizers` library's own; beside it stands what
`AutoTokenizer` alone gives. Wrong ids that are not refused are exit status 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.utils import logging

from data.templates.tokenizer_facts import backend_json
from post_training.errors import SetupError
from post_training.hf.tokenizer import PROBES, open_tokenizer

CLASSES = (
    "PreTrainedTokenizerFast",
    "LlamaTokenizer",
    "Qwen2TokenizerFast",
    "GPT2Tokenizer",
    "CodeLlamaTokenizer",
    None,
)
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3_moe", None)


def make_folder(
    folder: Path, tokenizer: Path, tokenizer_class: str | None, model_type: str | None
) -> None:
    """A copy of a tokenizer that says it is of another class, beside a config.json of another model."""
    folder.mkdir()
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("tokenizer_class", None)
    if tokenizer_class is not None:
        settings["tokenizer_class"] = tokenizer_class
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


def differs(tokenizer: Any, file: Path, texts: Sequence[str]) -> str | None:
    """The first text whose ids are not the file's, by the tokenizer or by what its workers get."""
    own, worker = Tokenizer.from_file(str(file)), Tokenizer.from_str(backend_json(tokenizer))
    for backend in (own, worker):
        backend.no_padding()
        backend.no_truncation()
    for text in texts:
        ids = own.encode(text, add_special_tokens=False).ids
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            return text
        if worker.encode(text, add_special_tokens=False).ids != ids:
            return text
        if tokenizer(text)["input_ids"] != own.encode(text).ids:
            return text
    return None


def survey(
    folder: Path,
    tokenizers: Sequence[Path],
    texts: Sequence[str],
    kinds: Sequence[tuple[str | None, str | None]] = tuple(product(CLASSES, MODEL_TYPES)),
) -> list[tuple[str, str, str]]:
    """What became of each folder: its name, ours and `AutoTokenizer`'s."""
    found = []
    for number, (path, (kind, model)) in enumerate(product(tokenizers, kinds)):
        here = folder / str(number)
        make_folder(here, path, kind, model)
        try:
            text = differs(open_tokenizer(str(here), "tokenizer"), here / "tokenizer.json", texts)
            ours = "equal" if text is None else f"WRONG from {text[:30]!r}"
        except SetupError as error:
            ours = f"refused: {error}"
        try:
            text = differs(AutoTokenizer.from_pretrained(here), here / "tokenizer.json", texts)
            theirs = "equal" if text is None else f"wrong from {text[:30]!r}"
        except Exception as error:  # noqa: BLE001 - whatever its classes raise
            theirs = f"fails: {type(error).__name__}"
        found.append((f"{path.name} | {kind} | {model}", ours, theirs))
        shutil.rmtree(here)
    return found


def main() -> int:
    """Run the survey; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Folder of tokenizers.")
    parser.add_argument("--names", nargs="+", default=["*"], help="Names or patterns of them.")
    parser.add_argument("--texts", type=Path, help="A .jsonl file of further texts.")
    options = parser.parse_args()
    logging.set_verbosity_error()
    texts = list(PROBES)
    if options.texts:
        with options.texts.open(encoding="utf-8") as lines:
            texts += ["\n".join(map(str, json.loads(line).values())) for line in lines]
    paths = sorted(
        path.parent
        for name in options.names
        for path in options.folder.glob(f"{name}/tokenizer.json")
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = survey(Path(folder), paths, texts)
    print("| tokenizer | class | model_type | here | AutoTokenizer |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    ours, theirs = (
        Counter(row[column].split()[0].rstrip(":") for row in rows) for column in (1, 2)
    )
    print(f"\n{len(rows)} folders; here: {dict(ours)}; AutoTokenizer alone: {dict(theirs)}")
    return 1 if ours["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
