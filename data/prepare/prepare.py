"""From rows to Documents: where they come from, the cache key, and who builds."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.documents.cache_build import FolderSink, MemorySink, feed, is_report
from data.documents.cache_folder import build_once
from data.documents.documents import Documents, open_documents
from data.documents.shard import Shard
from data.errors import DataError
from data.prepare.options import PrepareOptions, plain_facts, tokenize_options
from data.rows.columns import list_unread
from data.rows.converters import FormatOptions
from data.rows.plain import PLAIN_FORMATS
from data.rows.registry import NAMED_DATASETS, converter, converter_source, detect_format
from data.sources.chunks import Chunk, first_rows, read_chunk
from data.sources.digest import digest_files
from data.sources.files import compressed_format, resolve_files
from data.sources.hub import load_dataset
from data.sources.readers import dataset_chunks, file_chunks
from data.templates.tokenizer_facts import text_hash
from data.tokenise.options import TokenizeOptions
from data.tokenise.row_tokenizer import RowTokenizer
from data.tokenise.worker import WorkerPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Below this many bytes starting worker processes costs more than it saves.
_WORKER_BYTES = 6 << 20
_MAX_WORKERS = 32
# Above this many bytes a worker making a faster tokenizer ready (FastBPE) costs less than it saves.
_FAST_BYTES = 4 << 20
# Paths that are named where documents are said to be made from others than before.
_NAMES_SHOWN = 3
# Libraries whose version may change ids or masks.
_LIBRARIES = ("tokenizers", "jinja2")
# Folders of this package whose code ids, masks and shards depend on: it is part of every cache key. A key
# says only whether to tokenise again; whether documents are the same, their contents say.
_CODE_FOLDERS = ("sources", "rows", "templates", "documents", "images", "masking", "tokenise")
# The key of what a template's clock said, in what documents are made of.
DAY = "day of the chat template"
_PACKAGE = Path(__file__).parents[1]


def prepare_documents(
    *,
    files: Sequence[str] = (),
    hf_dataset: str | None = None,
    split: str = "train",
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    cache_dir: str | Path | None,
    files_flag: str = "--finetune-data-files",
    **options: Any,
) -> Documents:
    """Tokenise the rows of files or of a HuggingFace dataset, or open the cache of an earlier run.

    Args:
        files: Files, folders or globs; exactly one of ``files`` and ``hf_dataset`` is given.
        hf_dataset: Hub name, or a local folder with a dataset.
        split: Split of ``hf_dataset``.
        tokenizer: A fast HuggingFace tokenizer.
        seq_length: Longest document in tokens.
        cache_dir: Folder of caches; None keeps everything in memory.
        files_flag: The flag that ``files`` came from, for messages.
        options: The other fields of ``PrepareOptions``.

    Returns:
        Documents of at most ``seq_length`` tokens, each with at least one trained token.

    Raises:
        DataError: anything in the data or the options that has to be put right.
    """
    if bool(files) == bool(hf_dataset):
        found = "both" if files else "neither"
        raise DataError(f"give either {files_flag} or --finetune-hf-dataset (found {found}).")
    settings = PrepareOptions(seq_length=seq_length, **options)
    folder = None if cache_dir is None else Path(cache_dir).expanduser()
    if hf_dataset is not None:
        settings, split = named_settings(hf_dataset, settings, split)
        dataset = load_dataset(hf_dataset, split)
        source = _Source(
            name=hf_dataset,
            chunks=lambda: dataset_chunks(dataset, hf_dataset),
            digest=str(getattr(dataset, "_fingerprint", hf_dataset)),
            size=int(getattr(dataset, "size_in_bytes", None) or 1 << 30),
            names=[f"{hf_dataset}[{split}]"],
        )
    else:
        paths = resolve_files(files, files_flag)
        source = _Source(
            name=", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else ""),
            chunks=lambda: chain.from_iterable(file_chunks(p, i) for i, p in enumerate(paths)),
            digest=digest_files(paths, folder),
            size=sum(path.stat().st_size for path in paths),
            names=[str(path) for path in paths],
            kinds=[compressed_format(path) for path in paths],
        )
    return _Preparation(source, tokenizer, settings).documents(folder)


def named_settings(
    hf_dataset: str, settings: PrepareOptions, split: str
) -> tuple[PrepareOptions, str]:
    """Settings and split for a dataset, which a well-known one, or a local copy, has entries for."""
    named = NAMED_DATASETS.get(hf_dataset)
    if named is None and Path(hf_dataset).is_dir():
        folder = Path(hf_dataset).resolve().name
        named = next((v for k, v in NAMED_DATASETS.items() if k.endswith(f"/{folder}")), None)
    if named is None:
        return settings, split
    settings = replace(settings, dataset_template=named.template)
    columns = settings.format_options
    if settings.conversation_format is None and columns.names_nothing:
        own = replace(
            named.options,
            ignore_columns=columns.ignore_columns,
            strict_columns=columns.strict_columns,
        )
        settings = replace(settings, conversation_format=named.format, format_options=own)
    # A copy may hold its training split under the usual name.
    copy = Path(hf_dataset)
    renamed = copy.is_dir() and next(copy.rglob(f"*{named.split}*"), None) is None
    return settings, named.split if split == "train" and not renamed else split


def dataset_template(hf_dataset: str | None) -> str | None:
    """The chat template that a dataset has of its own, for tokenizers without one."""
    if hf_dataset is None:
        return None
    return named_settings(hf_dataset, PrepareOptions(seq_length=2), "train")[0].dataset_template


def prepare_rows(
    rows: Any, *, tokenizer: PreTrainedTokenizerBase, seq_length: int, **options: Any
) -> Documents:
    """Tokenise rows that are in memory: a ``datasets.Dataset`` or a sequence of dictionaries.

    Args:
        rows: The rows.
        tokenizer: A fast HuggingFace tokenizer.
        seq_length: Longest document in tokens.
        options: The other fields of ``PrepareOptions``.

    Raises:
        DataError: anything in the rows or the options that has to be put right.
    """
    settings = PrepareOptions(seq_length=seq_length, **{"workers": 0, **options})
    source = _Source("rows", lambda: dataset_chunks(rows, "rows"), "", 0, ["rows"])
    return _Preparation(source, tokenizer, settings).documents(None)


def first_format(chunks: Iterable[Chunk], columns: FormatOptions, skip: bool) -> str:
    """The format of a source: that of its first row.

    Args:
        chunks: The chunks of the source.
        columns: Column names that were given.
        skip: Go on to the first row that is in a format, since rows before it are bad ones.

    Raises:
        DataError: the first row is in none; with ``skip``, no row is in one.
    """
    unknown: DataError | None = None
    for piece in chunks:
        for raw in read_chunk(piece):
            if raw.error is not None or not isinstance(raw.row, dict):
                if skip:
                    continue
                return "messages"  # reported with its place when the row is reached
            try:
                return detect_format(raw.row, columns)
            except DataError as error:
                unknown = unknown or DataError(f"{raw.place}: {error}")
                if not skip:
                    raise unknown from error
    if unknown is not None:
        raise unknown
    return "messages"


def settle_format(
    tokenizer: PreTrainedTokenizerBase,
    settings: PrepareOptions,
    chunks: Callable[[], Iterable[Chunk]],
) -> PrepareOptions:
    """Settings with the format, where the rows may need no template and the tokenizer has none."""
    given = settings.conversation_format, settings.chat_template, settings.dataset_template
    if tokenizer.chat_template or any(given):
        return settings
    name = first_format(chunks(), settings.format_options, settings.on_bad_row == "skip")
    return replace(settings, conversation_format=name if name in PLAIN_FORMATS else None)


@dataclass(frozen=True)
class _Source:
    name: str
    chunks: Callable[[], Iterable[Chunk]]
    digest: str
    size: int
    names: list[str]
    kinds: Sequence[str] = ()


class _Preparation:
    def __init__(
        self, source: _Source, tokenizer: PreTrainedTokenizerBase, settings: PrepareOptions
    ) -> None:
        self.source, self.settings = source, settings
        self.settings = settings = settle_format(tokenizer, settings, self._chunks)
        self.options, self.facts = tokenize_options(tokenizer, settings)

    def _chunks(self) -> Iterable[Chunk]:
        return first_rows(self.source.chunks(), self.settings.max_rows)

    def documents(self, cache_dir: Path | None) -> Documents:
        made_of = self._made_of()
        if cache_dir is None:
            documents = self._in_memory()
        else:
            key = text_hash(json.dumps(made_of))
            folder = build_once(cache_dir, key, self._build)
            documents = open_documents(folder)
            if not is_report(documents.report):
                raise DataError(
                    f"{folder}: not a complete token cache (its report lacks something). Remove the folder "
                    "and run again."
                )
        # The cache is the same under any names of the files, so what names them is added here.
        report = documents.report | {
            "sources": self.source.names,
            "made_of": {"path": self._shown_names(), **made_of},
            # Of this preparation's flags: those that do not change the documents are in no cache.
            "warnings": self.facts.get("warnings", []) + self._warnings(documents.report),
        }
        return replace(documents, report=report)

    def _build(self, folder: Path, target: Path) -> None:
        sink = FolderSink(folder)
        try:
            chunks = islice(self._chunks(), sink.finished.done, None)
            feed(sink, self._shards(chunks, self._with_format()))
            self._require_documents(sink.finished.counts)
            sink.publish(target, target.name, self.facts)
        finally:
            sink.close()

    def _in_memory(self) -> Documents:
        sink = MemorySink()
        feed(sink, self._shards(self._chunks(), self._with_format()))
        self._require_documents(sink.finished.counts)
        documents = sink.documents("")
        report = documents.report | self.facts
        return replace(documents, fingerprint=documents.contents, report=report)

    def _shards(self, chunks: Iterable[Chunk], options: TokenizeOptions) -> Iterator[Shard]:
        count = self.settings.workers
        if count is None:
            count = min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
            if count < 2 or self.source.size < _WORKER_BYTES:
                count = 0
        many = self.source.size > _FAST_BYTES * max(count, 1)
        if count == 0:
            tokenizer = RowTokenizer(options, many)
            yield from map(tokenizer.chunk, chunks)
            return
        with ExitStack() as stack:
            pool = WorkerPool(options, count, many)
            stack.callback(pool.close)
            yield from pool.map(iter(chunks))

    def _with_format(self) -> TokenizeOptions:
        """The options with the format that the first good row is in."""
        options = self.options
        if not options.format:
            skip = self.settings.on_bad_row == "skip"
            name = first_format(self._chunks(), self.settings.format_options, skip)
            self.facts["format"] = name
            options = replace(options, format=name)
        # Resolved here as well, so that a wrong name is refused before workers start.
        if options.format in PLAIN_FORMATS:
            self.facts |= plain_facts(options)
        else:
            converter(options.format, options.mapping)
        return options

    def _require_documents(self, counts: Counter[str]) -> None:
        """Refuse data without documents.

        Raises:
            DataError: there is nothing to train on.
        """
        read, kept = counts["read"], counts["kept"]
        if not read:
            raise DataError(f"{self.source.name}: there are no rows. Give data with at least one.")
        if not kept:
            dropped = "".join(
                f", {count:,} dropped ({name.removeprefix('dropped: ')})"
                for name, count in counts.items()
                if name.startswith("dropped: ")
            )
            raise DataError(
                f"{self.source.name}: no row can be trained; {read:,} read{dropped}. "
                "Check the rows, --seq-length, --loss-on, --reasoning and the chat template."
            )

    def _warnings(self, report: dict[str, Any]) -> list[str]:
        """What the template, or the rows, leave out of the training."""
        name = self.source.name
        warnings = []
        if unread := report["unread"]:
            warnings.append(
                f"nobody reads these columns and fields of {name} (with the number of rows that have "
                f"them): {list_unread(unread)}; --ignore-columns NAME... says so, --strict-columns makes "
                "it an error"
            )
        if empty := report["empty_answers"]:
            warnings.append(
                f"{empty:,} rows of {name} have an empty answer that is trained: the model learns to "
                'stop at once ("loss": false in a message leaves it out)'
            )
        if self.settings.max_rows == report["read"]:
            warnings.append(
                f"--max-rows {report['read']}: {name} was read up to its row {report['read']:,}; what may "
                "follow is left out"
            )
        if crossing := report["boundary_tokens"]:
            warnings.append(
                f"{crossing:,} tokens of {name} hold the end of a header and the "
                "beginning of an answer (or its end and what follows): they are not trained"
            )
        if unclosed := report["unclosed_thoughts"]:
            warnings.append(
                f"{unclosed:,} rows of {name} have an answer that ends inside its "
                "<think> block: the model learns to stop there (--reasoning last or mask refuses it)"
            )
        if untold := report["tools_not_shown"]:
            warnings.append(
                f"{untold:,} rows of {name} have tools on offer that the chat template "
                "does not show to the model; --chat-template FILE gives one that does"
            )
        return warnings

    def _shown_names(self) -> str:
        """The names of the sources; of many the first, and a hash of all."""
        names = self.source.names
        if len(names) <= _NAMES_SHOWN:
            return ", ".join(names)
        return f"{names[0]} and {len(names) - 1} more ({text_hash(*names)[:8]})"

    def _made_of(self) -> dict[str, str]:
        """What the documents are made of and by, hashed: the cache's key is made of it."""
        options = vars(self.options) | {"mapping": vars(self.options.mapping)}
        options["kinds"] = self.source.kinds
        options["max_rows"] = self.settings.max_rows
        options.pop("no_images")  # a reason, with the model's path in it
        if self.options.images is not None:
            # Relative paths of pictures are meant beside the files.
            options["folders"] = sorted({str(Path(n).resolve().parent) for n in self.source.names})
        template = options.pop("template")
        day = options.pop("day")
        names = ("tokenizer", "special_tokens", "special", "added")
        tokenizer = [options.pop(name) for name in names]
        libraries = [f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES]
        name = self.options.format
        return {
            "bytes of the files": self.source.digest,
            "tokenizer": text_hash(json.dumps(tokenizer)),
            "chat template": text_hash(template),
            **({DAY: day} if day else {}),
            "data flags": text_hash(json.dumps(options, sort_keys=True, default=str)),
            "converter": text_hash(converter_source(name).hex()) if name else "",
            "libraries": ", ".join(libraries),
            "code of this project": _code_hash(),
        }


@functools.cache
def _code_hash() -> str:
    sources = [
        source for folder in _CODE_FOLDERS for source in sorted((_PACKAGE / folder).glob("*.py"))
    ]
    return text_hash(*(source.read_text(encoding="utf-8") for source in sources))
