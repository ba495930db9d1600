"""From rows to Documents: read, convert, render, mask, tokenise, cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import batched, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from filelock import FileLock

from data.answer_spans import AnswerFinder, trained_spans
from data.chat_template import ChatTemplate
from data.errors import DataError, RowError
from data.formats import FORMATS, detect_format
from data.sources import RawRow, read_file, resolve_files
from data.token_cache import CACHE_FORMAT, MANIFEST, Documents, open_documents
from data.token_mask import token_mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnBadRow = Literal["error", "skip"]
Overlong = Literal["drop", "error", "trim-turns"]
_BATCH = 512


def prepare_documents(
    *,
    files: Sequence[str] = (),
    hf_dataset: str | None = None,
    split: str = "train",
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    cache_dir: str | Path | None,
    on_bad_row: OnBadRow = "error",
    overlong: Overlong = "drop",
    chat_template: str | None = None,
    conversation_format: str | None = None,
) -> Documents:
    """Tokenise the rows of files or of a HuggingFace dataset, or open the cache of an earlier run.

    Args:
        files: Files, folders or globs; exactly one of ``files`` and ``hf_dataset`` is given.
        hf_dataset: Hub name or local folder that ``datasets.load_dataset`` reads.
        split: Split of ``hf_dataset``.
        tokenizer: A fast HuggingFace tokenizer.
        seq_length: Longest document in tokens.
        cache_dir: Folder of caches; None keeps everything in memory.
        on_bad_row: ``error`` stops at the first bad row, ``skip`` counts and lists it.
        overlong: What happens to documents longer than ``seq_length``.
        chat_template: Template text or file; None for the tokenizer's own.
        conversation_format: Name of the rows' format; None to detect it from the first row.

    Raises:
        DataError: anything in the data or the options that has to be put right.
    """
    if bool(files) == bool(hf_dataset):
        raise DataError(
            "give either --finetune-data-files or --finetune-hf-dataset "
            f"(found {'both' if files else 'neither'})."
        )
    template_text = _template_text(tokenizer, chat_template)
    key = hashlib.sha256()
    if files:
        paths = resolve_files(files)
        for path in paths:
            key.update(hashlib.blake2b(path.read_bytes()).digest())
        rows: Iterable[RawRow] = chain.from_iterable(read_file(p, i) for i, p in enumerate(paths))
        name = ", ".join(map(str, paths[:3]))
    else:
        assert hf_dataset is not None
        dataset = _load_hub(hf_dataset, split)
        key.update(str(getattr(dataset, "_fingerprint", hf_dataset)).encode())
        rows, name = _dataset_rows(dataset, hf_dataset), hf_dataset
    options = {
        "cache": CACHE_FORMAT,
        "template": template_text,
        "tokenizer": _tokenizer_hash(tokenizer),
        "seq_length": seq_length,
        "overlong": overlong,
        "on_bad_row": on_bad_row,
        "format": conversation_format,
    }
    key.update(json.dumps(options, sort_keys=True).encode())
    fingerprint = key.hexdigest()[:32]
    build = _Builder(
        tokenizer, template_text, seq_length, on_bad_row, overlong, conversation_format
    )
    if cache_dir is None:
        return build.in_memory(rows, fingerprint, name)
    return _cached(Path(cache_dir), fingerprint, lambda: build.in_memory(rows, fingerprint, name))


def prepare_rows(
    rows: Any, *, tokenizer: PreTrainedTokenizerBase, seq_length: int, **options: Any
) -> Documents:
    """Tokenise rows that are in memory already; see ``prepare_documents`` for the options."""
    build = _Builder(
        tokenizer,
        _template_text(tokenizer, options.get("chat_template")),
        seq_length,
        options.get("on_bad_row", "error"),
        options.get("overlong", "drop"),
        options.get("conversation_format"),
    )
    return build.in_memory(_dataset_rows(rows, "rows"), None, "rows")


class _Builder:
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_text: str,
        seq_length: int,
        on_bad_row: OnBadRow,
        overlong: Overlong,
        conversation_format: str | None,
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError("the tokenizer is a slow one without offsets; use a fast tokenizer.")
        self.backend = backend
        self.added_ids = frozenset(tokenizer.added_tokens_decoder)
        added = tokenizer.added_tokens_decoder.values()
        self.finder = AnswerFinder(
            ChatTemplate(template_text, _special_tokens(tokenizer)),
            [token.content for token in added if token.special],
            [token.content for token in added],
        )
        self.seq_length = seq_length
        self.on_bad_row = on_bad_row
        self.overlong = overlong
        self.format = conversation_format

    def in_memory(self, rows: Iterable[RawRow], fingerprint: str | None, name: str) -> Documents:
        report: dict[str, Any] = {"read": 0, "kept": 0, "dropped": Counter(), "bad_rows": []}
        ids: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        provenance: list[tuple[int, int]] = []
        crossing = 0
        for batch in batched(rows, _BATCH):
            rendered = list(self._render(batch, report))
            texts = [text for _, text, _ in rendered]
            encodings = self.backend.encode_batch(texts, add_special_tokens=False)
            for (raw, text, spans), encoding in zip(rendered, encodings, strict=True):
                mask, crossed = token_mask(encoding, spans, text, self.added_ids)
                crossing += crossed
                if len(mask) > self.seq_length:
                    if self.overlong == "error":
                        raise DataError(
                            f"{raw.place}: {len(mask)} tokens, --seq-length is {self.seq_length}. "
                            "Raise --seq-length or pass --overlong drop."
                        )
                    report["dropped"]["longer than --seq-length"] += 1
                elif not mask.any():
                    report["dropped"]["nothing to train"] += 1
                else:
                    ids.append(np.array(encoding.ids, np.int32))
                    masks.append(mask)
                    provenance.append((raw.source, raw.number))
                    report["kept"] += 1
        if not report["read"]:
            raise DataError(f"{name}: there are no rows. Give a file with at least one row.")
        if not ids:
            raise DataError(
                f"{name}: no row can be trained; {report['read']} read, dropped: "
                f"{dict(report['dropped'])}. Check the data, --seq-length and the template."
            )
        lengths = [len(document) for document in ids]
        input_ids, loss_mask = np.concatenate(ids), np.concatenate(masks)
        report["dropped"] = dict(report["dropped"])
        report["tokens"] = len(input_ids)
        report["trained_tokens"] = int(loss_mask.sum())
        report["boundary_tokens"] = crossing
        report["max_token_id"] = int(input_ids.max())
        if fingerprint is None:
            contents = hashlib.sha256(input_ids.tobytes())
            contents.update(loss_mask.tobytes())
            contents.update(np.array(lengths).tobytes())
            fingerprint = contents.hexdigest()[:32]
        return Documents(
            input_ids=input_ids,
            loss_mask=loss_mask,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            provenance=np.array(provenance, np.int64).reshape(-1, 2),
            fingerprint=fingerprint,
            report=report,
        )

    def _render(
        self, batch: Sequence[RawRow], report: dict[str, Any]
    ) -> Iterator[tuple[RawRow, str, list[tuple[int, int]]]]:
        for raw in batch:
            report["read"] += 1
            try:
                if raw.error is not None:
                    raise raw.error
                if not isinstance(raw.row, Mapping):
                    raise RowError("not an object", f"the row is {type(raw.row).__name__}")
                if self.format is None:
                    try:
                        self.format = detect_format(raw.row)
                    except DataError as error:
                        raise DataError(f"{raw.place}: {error}") from error
                conversation = FORMATS[self.format](raw.row)
                rendering = self.finder.find(conversation)
                yield raw, rendering.text, trained_spans(rendering, conversation)
            except RowError as error:
                if self.on_bad_row == "error":
                    raise DataError(
                        f"{raw.place}: {error}. Fix the row, or pass --on-bad-row skip to leave "
                        "out and count such rows."
                    ) from error
                report["dropped"][error.reason] += 1
                report["bad_rows"].append([raw.place, error.reason, error.detail])


def _cached(cache_dir: Path, fingerprint: str, build: Any) -> Documents:
    """Open ``cache_dir/fingerprint``; build and publish it first when it is not there."""
    folder = cache_dir / fingerprint
    if not folder.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(str(cache_dir / f"{fingerprint}.lock")):
            if not folder.exists():  # another process may have built it meanwhile
                documents: Documents = build()
                _publish(documents, folder)
    return open_documents(folder)


def _publish(documents: Documents, folder: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        documents.input_ids.tofile(temporary / "input_ids.bin")
        documents.loss_mask.tofile(temporary / "loss_mask.bin")
        documents.offsets.tofile(temporary / "offsets.bin")
        documents.provenance.tofile(temporary / "provenance.bin")
        manifest = {
            "format": CACHE_FORMAT,
            "fingerprint": documents.fingerprint,
            "documents": len(documents),
            "tokens": len(documents.input_ids),
            "report": documents.report,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        os.chmod(temporary, 0o755)
        os.rename(temporary, folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _dataset_rows(dataset: Any, name: str) -> Iterator[RawRow]:
    for number, row in enumerate(dataset):
        yield RawRow(0, number, f"{name}, row {number + 1}", row)


def _load_hub(name: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"--finetune-hf-dataset {name}: cannot be loaded ({str(error).splitlines()[0]}). "
            f"Check the name, the network, and --finetune-data-split {split}."
        ) from error


def _template_text(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    if chat_template is not None:
        if "{" in chat_template:
            return chat_template
        path = Path(chat_template)
        if not path.is_file():
            raise DataError(f"--chat-template {chat_template}: no such file.")
        return path.read_text(encoding="utf-8")
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not own:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template. "
            "Pass --chat-template FILE with the template of the model's family."
        )
    return str(own)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {
        name: str(value)
        for name, value in tokenizer.special_tokens_map.items()
        if isinstance(value, str)
    }


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.backend_tokenizer.to_str() + json.dumps(_special_tokens(tokenizer))
    return hashlib.sha256(text.encode()).hexdigest()
