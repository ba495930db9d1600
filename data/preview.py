"""What a finetuning run would see: every row's fate, every token's label, and the totals.

Used by ``scripts/preview.py``; needs no GPU and no process group.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.errors import DataError
from data.images.pictures import thumbnail
from data.packs.plan import PackingMode, plan_epoch
from data.rows.plain import PLAIN_FORMATS
from data.sources.chunks import Chunk, read_chunk
from data.tokenise.options import TokenizeOptions
from data.tokenise.row_tokenizer import PreviewRow, RowTokenizer

_TRAINED, _SPECIAL, _PLAIN, _RESET = "\033[32m", "\033[35m", "\033[2m", "\033[0m"
_HISTOGRAM_BINS = 10
_PICTURES_SHOWN = 8  # of a row
# Nothing is wider than the window: text breaks anywhere, but no figure and no heading within a word, and in
# a narrow one a source's figures stand below each other, each beside its name.
_STYLE = """body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em}
body,table,pre{overflow-wrap:anywhere}table{width:100%}
pre{white-space:pre-wrap;border:1px solid #ccc;padding:.7em;border-radius:4px}
.t{background:#c8f0c8}.s{color:#a0a}.st{background:#c8f0c8;color:#a0a}.u{color:#777}
table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}
td:first-child{min-width:8em;text-align:left}td:nth-child(2){min-width:6em}
th,td:nth-child(n+3){overflow-wrap:normal}
@media(max-width:70em){th{display:none}tr{display:block;margin-bottom:1em}
td{display:flex;justify-content:space-between;gap:1em}td::before{content:attr(data-name);flex:none}}"""

_HEAD = (
    "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    "<title>Preview</title>"
)


@dataclass
class SourceSummary:
    """Totals of one source.

    Attributes:
        name: The source.
        format: The rows' format.
        counts: Rows read, kept, trimmed and dropped by reason, turns, tokens.
        lengths: Tokens in each kept document.
        trained: Trained tokens in all.
        stop_trained: Kept documents whose last trained token is a stop.
    """

    name: str
    format: str
    counts: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    trained: int = 0
    stop_trained: int = 0

    def as_dict(
        self, seq_length: int, global_batch_size: int | None, packing: PackingMode, seed: int
    ) -> dict[str, Any]:
        """The totals, with a histogram of lengths, and the first epoch of this source alone."""
        dropped = {
            name.removeprefix("dropped: "): count
            for name, count in sorted(self.counts.items())
            if name.startswith("dropped: ")
        }
        tokens = sum(self.lengths)
        lengths = np.array(self.lengths, np.int64)
        plan = plan_epoch(lengths, seq_length, seed=seed, epoch=0, mode=packing)
        packs = len(plan)
        return {
            "source": self.name,
            "format": self.format,
            "read": self.counts["read"],
            "kept": self.counts["kept"],
            "trimmed": self.counts["trimmed"],
            "dropped": dropped,
            "tokens": tokens,
            "trained_tokens": self.trained,
            "trained_share": self.trained / tokens if tokens else 0.0,
            "stop_trained_share": self.stop_trained / max(1, len(self.lengths)),
            "boundary_tokens": self.counts["boundary tokens"],
            "lengths": _histogram(self.lengths),
            "packs": packs,
            "fill": tokens / (packs * seq_length) if packs else 0.0,
            "steps_per_epoch": -(-packs // global_batch_size) if global_batch_size else None,
        }


def preview_source(
    chunks: Iterator[Chunk], name: str, options: TokenizeOptions
) -> Iterator[tuple[PreviewRow, SourceSummary]]:
    """Each row of a source with its fate; the summary is complete after the last one.

    Args:
        chunks: The source's chunks.
        name: Its name.
        options: How to tokenise, format included; rows that cannot be used are listed and never
            stop it.

    Raises:
        DataError: the source cannot be read.
    """
    tokenizer = RowTokenizer(replace(options, on_bad_row="skip"))
    summary = SourceSummary(name, options.format)
    stops = _stop_ids(tokenizer)
    for chunk in chunks:
        for raw in read_chunk(chunk):
            row = tokenizer.preview(raw, summary.counts)
            if row.status != "dropped":
                summary.lengths.append(len(row.input_ids))
                summary.trained += sum(row.loss_mask)
                trained = [i for i, m in zip(row.input_ids, row.loss_mask, strict=True) if m]
                summary.stop_trained += trained[-1] in stops
            yield row, summary


def write_json_row(row: PreviewRow, out: IO[str]) -> None:
    """One JSON object: file, row, input_ids, loss_mask, text, status, reason."""
    entry = {
        "file": row.raw.file,
        "row": row.raw.number,
        "input_ids": row.input_ids,
        "loss_mask": row.loss_mask,
        "text": row.text,
        "status": row.status,
        "reason": row.reason,
    }
    # Lone surrogates cannot be written as UTF-8; escaped they can.
    out.write(json.dumps(entry, ensure_ascii=True) + "\n")


def row_title(row: PreviewRow) -> str:
    """Place and fate of a row, in one line without control characters."""
    return _visible(f"{row.raw.place}: {row.status} {row.reason}").replace("\n", " ")


def coloured(row: PreviewRow, special: set[int]) -> str:
    """The row's text for a terminal: trained green, special tokens magenta, the rest dim."""
    parts = []
    for text, trained, is_special in _pieces(row, special):
        colour = _TRAINED if trained else _PLAIN
        colour += _SPECIAL if is_special else ""
        parts.append(f"{colour}{_visible(text)}{_RESET}")
    return "".join(parts)


def html_page(rows: list[tuple[PreviewRow, set[int]]], summaries: list[dict[str, Any]]) -> str:
    """A page of its own with the totals and the coloured rows."""
    parts = [f"{_HEAD}<style>{_STYLE}</style>"]
    parts.append("<h1>What the run would train on</h1>")
    parts.append(
        "<p><span class=t>trained</span> <span class=st>trained special token</span> "
        "<span class=u>not trained</span> <span class=s>special token</span></p><table>"
    )
    names = ("source", "format", "read", "kept", "trimmed", "tokens", "trained_share",
             "stop_trained_share", "packs", "fill", "steps_per_epoch")  # fmt: skip
    parts.append("<tr>" + "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names))
    for summary in summaries:
        parts.append("<tr>")
        for name in names:
            cell = summary[name]
            shown = html.escape(_clean(f"{cell:.4f}" if isinstance(cell, float) else str(cell)))
            parts.append(f"<td data-name='{name.replace('_', ' ')}'>{shown}</td>")
    parts.append("</table>")
    for row, special in rows:
        parts.append(f"<h3>{html.escape(row_title(row))}</h3>")
        parts += [thumbnail(picture, row.raw.file) for picture in row.pictures[:_PICTURES_SHOWN]]
        if (more := len(row.pictures) - _PICTURES_SHOWN) > 0:
            parts.append(f" and {more} more")
        parts.append("<pre>")
        for text, trained, is_special in _pieces(row, special):
            kind = ("st" if trained else "s") if is_special else ("t" if trained else "u")
            parts.append(f"<span class={kind}>{html.escape(_clean(text))}</span>")
        parts.append("</pre>")
    return "".join(parts) + "\n"


def summary_text(summary: dict[str, Any]) -> str:
    """The totals of a source, for a terminal."""
    lines = [
        f"{_visible(summary['source'])}  (format: {summary['format']})",
        f"  rows      {summary['read']} read, {summary['kept']} kept, {summary['trimmed']} trimmed",
    ]
    lines += [f"            {n} dropped: {why}" for why, n in summary["dropped"].items()]
    lines += [
        f"  tokens    {summary['tokens']}, {summary['trained_share']:.1%} trained",
        f"  stop      trained in {summary['stop_trained_share']:.1%} of documents",
        f"  packs     {summary['packs']}, fill {summary['fill']:.2%}",
    ]
    if summary["steps_per_epoch"]:
        lines.append(f"  steps     {summary['steps_per_epoch']} per epoch")
    widest = max((count for _, _, count in summary["lengths"]), default=1)
    for low, high, count in summary["lengths"]:
        bar = "#" * round(40 * count / max(1, widest))
        lines.append(f"  {low:>7}-{high:<7} {count:>8} {bar}")
    return "\n".join(lines)


def open_output(path: str) -> IO[str]:
    """Open a file to write to.

    Raises:
        DataError: it cannot be written.
    """
    try:
        return Path(path).open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(f"--json or --html {path}: cannot be written ({error}).") from error


def _stop_ids(tokenizer: RowTokenizer) -> set[int]:
    if tokenizer.options.format in PLAIN_FORMATS:
        end = tokenizer.options.text_end
        return set() if end is None else {end}
    ids: set[int] = set()
    for stop in tokenizer.renderer.finder.markup.stops:
        encoded = tokenizer.tokenizer.backend.encode(stop, add_special_tokens=False).ids
        if encoded:
            ids.add(encoded[-1])
    return ids


def _pieces(row: PreviewRow, special: set[int]) -> Iterator[tuple[str, bool, bool]]:
    """(text, trained, special) of consecutive tokens that are alike."""
    tokens = zip(row.input_ids, row.loss_mask, row.offsets, strict=False)
    alike = groupby(tokens, lambda token: (bool(token[1]), token[0] in special))
    shown = 0
    for (trained, is_special), group in alike:
        end = max(end for _, _, (_, end) in group)
        if end > shown:
            yield row.text[shown:end], trained, is_special
            shown = end


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _visible(text: str) -> str:
    # Control characters of the data must not reach the terminal.
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in _clean(text))


def _histogram(lengths: list[int]) -> list[tuple[int, int, int]]:
    if not lengths:
        return []
    counts, edges = np.histogram(lengths, bins=min(_HISTOGRAM_BINS, len(set(lengths))))
    bounds = np.ceil(edges).astype(int)
    return [
        (int(low), int(high), int(count))
        for low, high, count in zip(bounds, bounds[1:], counts, strict=False)
    ]
