"""Rows of one chunk to token ids and masks: the part of preparing that runs in worker processes.

Imports neither torch nor transformers, so that a worker starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.documents.shard import UNREAD, Shard
from data.errors import DataError, RowError
from data.images.pictures import Picture, PictureReader
from data.masking.refusals import ends_in_thought
from data.rows.conversation import has_empty_answer
from data.sources.chunks import Chunk, RawRow, read_chunk
from data.templates.marks import Span
from data.tokenise.masked_tokenizer import MaskedTokenizer, TokenizedText
from data.tokenise.options import TokenizeOptions
from data.tokenise.plain_tokens import plain_tokens, shown_tokens
from data.tokenise.row_renderer import RowRenderer, RowText

OVERLONG = "longer than --seq-length"
LONG_PROMPT = "prompt longer than --max-prompt-length"
NOTHING_TO_TRAIN = "nothing to train"
_BATCH = 256


@dataclass
class PreviewRow:
    """One row's fate, for previews.

    Attributes:
        raw: The row as it was read.
        status: ``kept``, ``trimmed`` or ``dropped``.
        reason: Why it was dropped, else empty.
        text: The rendered text.
        input_ids: Token ids; empty when there are none.
        loss_mask: Mask.
        offsets: Character span of each token.
        pictures: The pictures of the row as it holds them.
    """

    raw: RawRow
    status: str
    reason: str
    text: str = ""
    input_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    offsets: list[Span] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)


class Document(NamedTuple):
    """What a row becomes.

    Attributes:
        ids: int32 ``[tokens]``.
        mask: uint8 ``[tokens]``.
        repeats: How often each token of the text stands in them, int64 ``[tokens of the text]``, and the
            separator; None where each stands once.
        pictures: Its pictures.
    """

    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]
    repeats: npt.NDArray[np.int64] | None = None
    pictures: Sequence[Picture] = ()


class RowTokenizer:
    """Tokenises chunks of rows.

    Args:
        options: What to do.
        many: As for ``MaskedTokenizer``.
    """

    def __init__(self, options: TokenizeOptions, many: bool = False) -> None:
        self.options = options
        self.tokenizer = MaskedTokenizer(options.tokenizer, options.added, many)
        self.renderer = RowRenderer(options)
        self.reader: PictureReader | None = None
        if options.images is not None:
            cache = Path(options.image_cache) if options.image_cache else None
            self.reader = PictureReader(options.images, cache)

    def chunk(self, chunk: Chunk) -> Shard:
        """Tokenise the rows of one chunk; under ``error`` the first bad row's message is set."""
        counts: Counter[str] = Counter()
        documents: list[Document] = []
        provenance: list[tuple[int, int]] = []
        bad: list[tuple[str, str, str]] = []
        error: str | None = None
        pictures, sizes = b"", list[int]()
        try:
            for pending, document in self.rows(read_chunk(chunk), counts, bad):
                documents.append(document)
                provenance.append((pending.raw.source, pending.raw.number))
            if self.reader is not None:
                pictures, sizes = self.reader.close_chunk([each.pictures for each in documents])
        except DataError as problem:
            error = str(problem)
        ids = [document.ids for document in documents]
        masks = [document.mask for document in documents]
        lengths = np.array([len(own) for own in ids], np.int64)
        flat = np.concatenate(ids) if ids else np.empty(0, np.int32)
        counts["max token id"] = int(flat.max()) if len(flat) else -1
        trained = np.concatenate(masks) if masks else np.empty(0, np.uint8)
        counts["trained tokens"] = int(np.count_nonzero(trained))
        counts["tokens"] = len(flat)
        return Shard(
            input_ids=flat,
            loss_mask=trained,
            lengths=lengths,
            provenance=np.array(provenance, np.int64).reshape(-1, 2),
            hashes=np.frombuffer(b"".join(_hash(document) for document in documents), np.uint64),
            counts=dict(counts),
            bad_rows=bad,
            error=error,
            pictures=pictures,
            picture_sizes=np.array(sizes, np.int32),
        )

    def rows(
        self, raws: Iterator[RawRow], counts: Counter[str], bad: list[tuple[str, str, str]]
    ) -> Iterator[tuple[RowText, Document]]:
        """Documents of rows, batch by batch, with the counts kept up to date.

        Raises:
            DataError: a row that stops the run.
        """
        batch: list[RowText] = []
        for raw in raws:
            counts["read"] += 1
            try:
                batch.append(self.renderer.render(raw))
            except RowError as error:
                # The rows before it come first, so that the first fault in the file is reported.
                yield from self._tokenize(batch, counts, bad)
                batch = []
                self._bad(raw, error, counts, bad)
            if len(batch) == _BATCH:
                yield from self._tokenize(batch, counts, bad)
                batch = []
        yield from self._tokenize(batch, counts, bad)

    def preview(self, raw: RawRow, counts: Counter[str]) -> PreviewRow:
        """One row with its text, ids and mask, or why it would be dropped."""
        bad: list[tuple[str, str, str]] = []
        trimmed = counts["trimmed"]
        try:
            documents = list(self.rows(iter([raw]), counts, bad))
        except DataError as error:  # an over-long document under --overlong error
            counts[f"dropped: {OVERLONG}"] += 1
            return PreviewRow(raw, "dropped", str(error))
        if not documents:
            _, reason, detail = bad[-1]
            text = ""
            with contextlib.suppress(RowError):
                text = self.renderer.render(raw).text
            return PreviewRow(raw, "dropped", f"{reason}: {detail}", text)
        pending, (ids, mask, repeats, _) = documents[0]
        if pending.plain is not None:
            shown, offsets = shown_tokens(ids.tolist(), self.tokenizer)
            return PreviewRow(raw, "kept", "", shown, ids.tolist(), mask.tolist(), offsets)
        offsets = self.tokenizer.offsets(pending.text, pending.edges)
        if repeats is not None:
            offsets = [span for span, n in zip(offsets, repeats, strict=False) for _ in range(n)]
        status = "trimmed" if counts["trimmed"] > trimmed else "kept"
        sources = pending.conversation.pictures
        return PreviewRow(
            raw, status, "", pending.text, ids.tolist(), mask.tolist(), offsets, sources
        )

    def _tokenize(
        self, batch: Sequence[RowText], counts: Counter[str], bad: list[tuple[str, str, str]]
    ) -> Iterator[tuple[RowText, Document]]:
        if not batch:
            return
        tokenized = self._tokens(batch)
        for pending, tokens in zip(batch, tokenized, strict=True):
            try:
                if pending.plain is not None:
                    tokens = plain_tokens(pending.plain, tokens, self.options)
                    self._require_known(tokens.ids)
                document, crossed, trimmed = self._document(pending, tokens)
            except RowError as error:
                if error.reason in (OVERLONG, LONG_PROMPT, NOTHING_TO_TRAIN):
                    if error.reason != NOTHING_TO_TRAIN and self.options.overlong == "error":
                        flag = error.reason.split()[-1]
                        raise DataError(
                            f"{pending.raw.place}: {error.detail}. Raise {flag}, or pass "
                            "--overlong drop or trim-turns."
                        ) from error
                    counts[f"dropped: {error.reason}"] += 1
                    bad.append((pending.raw.place, error.reason, error.detail))
                else:
                    self._bad(pending.raw, error, counts, bad)
                continue
            counts["kept"] += 1
            counts["trimmed"] += trimmed
            counts["turns"] += pending.turns
            counts["stopped turns"] += pending.stopped
            counts["boundary tokens"] += crossed
            if pending.conversation.tools and not self.renderer.finder.forms.shows_tools:
                counts["tools not shown"] += 1
            if "<think>" in pending.text and ends_in_thought(pending.conversation.messages):
                counts["unclosed thoughts"] += 1
            counts["empty answers"] += has_empty_answer(pending.conversation)
            for name in pending.conversation.unread:
                counts[UNREAD + name] += 1
            yield pending, document

    def _require_known(self, ids: npt.NDArray[np.int32]) -> None:
        """Check ids that a row brought along.

        Raises:
            RowError: the tokenizer has no such token.
        """
        if len(ids) and ids.max() > self.tokenizer.largest_id:
            raise RowError(
                "bad token ids",
                f"'input_ids' holds {ids.max()}, the tokenizer's largest id is {self.tokenizer.largest_id}",
            )

    def _tokens(self, rows: Sequence[RowText]) -> list[TokenizedText]:
        return self.tokenizer.tokenize(
            [row.text for row in rows], [row.spans for row in rows], [row.edges for row in rows]
        )

    def _document(self, pending: RowText, tokens: TokenizedText) -> tuple[Document, int, bool]:
        """The document of a row, shortened if need be, and the tokens that cross an edge of its mask.

        Raises:
            RowError: it is too long, or nothing in it is trained.
        """
        separator = self.options.separator
        room = self.options.seq_length - (separator is not None)
        document, crossing, trimmed = self._expanded(pending, tokens), tokens.crossing, False
        length, prompt = len(document.ids), int(document.mask.argmax())
        longest = self.options.max_prompt_length or length
        if length > room or prompt > longest:
            if self.options.overlong == "trim-turns":
                found = self._trimmed(pending, room, longest)
                if found is not None:
                    (document, crossing), trimmed = found, True
            if not trimmed and length > room:
                raise RowError(OVERLONG, f"{length} tokens, --seq-length is {room}")
            if not trimmed:
                raise RowError(LONG_PROMPT, f"{prompt} tokens, --max-prompt-length is {longest}")
        ids, mask, repeats, pictures = document
        if not np.count_nonzero(mask):
            raise RowError(NOTHING_TO_TRAIN, "no token of this row is trained")
        if separator is not None:
            if np.count_nonzero(ids == separator):
                text = self.options.added[separator]
                raise RowError("separator in text", f"the row holds the separator {text!r}")
            ids, mask = _with_last(ids, separator), _with_last(mask, 0)
        return Document(ids, mask, repeats, pictures), crossing, trimmed

    def _trimmed(self, pending: RowText, room: int, longest: int) -> tuple[Document, int] | None:
        """The document without its oldest turns, if that is enough; ``pending`` becomes its row."""

        def fits(row: RowText) -> bool:
            document = self._expanded(row, self._tokens([row])[0])
            return len(document.ids) <= room and int(document.mask.argmax()) <= longest

        shorter = self.renderer.without_oldest_turns(pending, fits)
        if shorter is None:
            return None
        pending.text, pending.spans, pending.edges = shorter.text, shorter.spans, shorter.edges
        pending.turns, pending.stopped = shorter.turns, shorter.stopped
        pending.conversation = shorter.conversation
        (tokens,) = self._tokens([shorter])
        return self._expanded(shorter, tokens), tokens.crossing

    def _expanded(self, row: RowText, tokens: TokenizedText) -> Document:
        """Ids and mask of a row with as many image tokens as its pictures have.

        Raises:
            RowError: a picture cannot be used, or the row has other image tokens than pictures.
        """
        if self.reader is None or row.plain is not None:
            return Document(tokens.ids, tokens.mask)
        sources, pictures = row.conversation.pictures, []
        for number, source in enumerate(sources, 1):
            try:
                pictures.append(self.reader.read(source, row.raw.file))
            except RowError as error:
                what = f"picture {number} of {len(sources)}: {error.detail}"
                raise RowError(error.reason, what) from error
        repeats = self.reader.layout.repeats(tokens.ids, [picture.grid for picture in pictures])
        if not pictures:
            return Document(tokens.ids, tokens.mask)
        ids, mask = np.repeat(tokens.ids, repeats), np.repeat(tokens.mask, repeats)
        return Document(ids, mask, repeats, pictures)

    def _bad(
        self,
        raw: RawRow,
        error: RowError,
        counts: Counter[str],
        bad: list[tuple[str, str, str]],
    ) -> None:
        if self.options.on_bad_row == "error":
            raise DataError(
                f"{raw.place}: {error}. Fix the row, or pass --on-bad-row skip to leave out and "
                "count such rows."
            ) from error
        counts[f"dropped: {error.reason}"] += 1
        bad.append((raw.place, error.reason, error.detail))


def _hash(document: Document) -> bytes:
    """Hash of a document's tokens and pictures."""
    digest = blake2b(document.ids, digest_size=8)
    for picture in document.pictures:
        digest.update(picture.digest.encode())
    return digest.digest()


def _with_last[T: np.generic](array: npt.NDArray[T], value: int) -> npt.NDArray[T]:
    longer = np.empty(len(array) + 1, array.dtype)  # np.append takes five times as long
    longer[:-1] = array
    longer[-1] = value
    return longer
