"""One self-contained HTML page of a run: curves, evaluations, data, layout, versions, restarts, answers."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.errors import SetupError
from post_training.files import DERIVED, config_of_run, json_object
from post_training.metrics.records import ANSWERS, DATA_REPORT, QUANTISATION, STARTS, records_of

PAGE = "report.html.j2"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 240, 58, 24, 10, 12
MOST_POINTS = 800
MOST_ANSWERS = 100
# Of the configuration, in view; all of it unfolds.
CHOSEN = (
    *("hf_model", "world_size", "tensor_model_parallel_size", "sequence_parallel"),
    *("pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank"),
    *("context_parallel_size", "expert_model_parallel_size", "use_torch_fsdp2"),
    *("use_distributed_optimizer", "bf16", "fp16", "recompute_granularity", "seq_length"),
    *("micro_batch_size", "global_batch_size", "train_iters", "num_epochs", "optimizer", "lr"),
    *("lr_decay_style", "weight_decay", "lora_rank", "draft", "seed"),
)
Points = list[tuple[float, float]]
# Each curve: a title, and the fields of `metrics.jsonl` in it; those of evaluations by their split.
CURVES: tuple[tuple[str, dict[str, tuple[str | None, str]]], ...] = (
    (
        "Loss per trained token",
        {
            "train": (None, "lm_loss"),
            "valid": ("valid", "loss"),
            "test": ("test", "loss"),
        },
    ),
    (
        "Token accuracy",
        {"train": (None, "token_accuracy"), "valid": ("valid", "token_accuracy")},
    ),
    ("Accuracy of evaluations", {"valid": ("valid", "eval_accuracy")}),
    ("Learning rate", {"lr": (None, "lr")}),
    ("Gradient norm", {"norm": (None, "grad_norm")}),
    (
        "Tokens a second",
        {"positions": (None, "tokens_per_s"), "of documents": (None, "real_tokens_per_s")},
    ),
    ("Share of the peak (MFU)", {"mfu": (None, "mfu")}),
    (
        "Expert imbalance",
        {
            "mean": (None, "expert_imbalance"),
            "worst layer": (None, "expert_imbalance_worst_layer"),
        },
    ),
)


@dataclass(frozen=True)
class Line:
    """One series of a drawing."""

    name: str
    path: str
    """Of SVG."""
    dots: list[tuple[str, str]]
    """Places of points to be seen as such: those of a series of few."""
    last: str


@dataclass(frozen=True)
class Drawing:
    """One curve, in units of its view box."""

    title: str
    lines: list[Line]
    across: list[tuple[float, str]]
    upwards: list[tuple[float, str]]
    restarts: list[float]


def short(value: float) -> str:
    """A number for an axis."""
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.2e}"


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers inside of a range."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(s for s in (step, 2 * step, 5 * step, 10 * step) if (high - low) / s <= most)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _thinned(points: Points) -> Points:
    """Few enough points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept: Points = []
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def draw(title: str, series: Mapping[str, Points], restarts: Iterable[int]) -> Drawing | None:
    """A drawing of what has points; None where nothing has."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    places = [point for points in series.values() for point in points]
    first, end = min(x for x, _ in places), max(x for x, _ in places)
    low, high = min(y for _, y in places), max(y for _, y in places)
    if first == end:
        first, end = first - 1, end + 1
    if high - low <= 1e-9 * abs(high):
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)

    def x_of(x: float) -> float:
        return LEFT + (x - first) / (end - first) * (WIDTH - LEFT - RIGHT)

    def y_of(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    lines = []
    for name, points in series.items():
        shown = [(f"{x_of(x):.1f}", f"{y_of(y):.1f}") for x, y in _thinned(points)]
        path = "M" + " L".join(f"{x},{y}" for x, y in shown)
        lines.append(Line(name, path, shown if len(shown) <= 40 else [], short(points[-1][1])))
    return Drawing(
        title,
        lines,
        [(x_of(x), short(x)) for x in _ticks(first, end, 8)],
        [(y_of(y), short(y)) for y in _ticks(low, high, 5)],
        [x_of(x) for x in restarts if first < x < end],
    )


def drawings(records: Sequence[Mapping[str, Any]], restarts: Sequence[int]) -> list[Drawing]:
    """All curves that a run has numbers for."""

    def points(split: str | None, name: str) -> Points:
        return [
            (record["iteration"], float(record[name]))
            for record in records
            if record.get("split") == split and isinstance(record.get(name), int | float)
        ]

    found = [
        draw(title, {label: points(*where) for label, where in series.items()}, restarts)
        for title, series in CURVES
    ]
    return [each for each in found if each is not None]


def answers_of(files: Iterable[Path]) -> list[dict[str, Any]]:
    """What `scripts/evaluate.py --json` wrote; files of other kinds are passed over."""
    found = []
    for file in files:
        try:
            scores = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(scores, dict) and isinstance(scores.get("answers"), list):
            rows = [row for row in scores["answers"] if isinstance(row, dict)]
            shown = scores | {"file": file.name, "answers": rows[:MOST_ANSWERS], "all": len(rows)}
            shown["columns"] = list(
                dict.fromkeys(key for row in rows[:MOST_ANSWERS] for key in row)
            )
            found.append(shown)
    return found


def own_answers(folder: Path) -> list[Path]:
    """Files with answers in an output folder: of `--answer-tokens` the newest step's of each split."""
    steps = sorted(
        (folder / ANSWERS).glob("*-*.json"), key=lambda file: (len(file.name), file.name)
    )
    newest = {file.name.rpartition("-")[0]: file for file in steps}
    return [*newest.values(), *sorted(folder.glob("*.json"))]


def write_report(folder: Path, page: Path, answers: Sequence[Path] | None = None) -> None:
    """Write the page of a run.

    Args:
        folder: the output folder.
        page: the file to write.
        answers: files of `scripts/evaluate.py --json`; those of `own_answers` by default.

    Raises:
        OSError: the page cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader

    config = config_of_run(folder)
    records, starts = records_of(folder), records_of(folder, STARTS)
    config.pop(DERIVED, None)
    steps = [record for record in records if "lm_loss" in record]
    data, quantised = folder / DATA_REPORT, {}
    with contextlib.suppress(SetupError):  # there is none, or a full disk has left a part of it
        quantised = json_object(folder / QUANTISATION)
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    ).get_template(PAGE)
    text = template.render(
        name=folder.resolve().name,
        config=config,
        chosen={key: config[key] for key in CHOSEN if config.get(key) not in (None, False)},
        last=steps[-1] if steps else {},
        evaluations=[record for record in records if "split" in record]
        + records_of(folder, "evaluations.jsonl"),
        drawings=drawings(records, [start["iteration"] for start in starts[1:]]),
        starts=starts,
        data=data.read_text(encoding="utf-8", errors="replace") if data.is_file() else "",
        answers=answers_of(own_answers(folder) if answers is None else answers),
        quantised=quantised,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        bottom=HEIGHT - BOTTOM,
        short=short,
    )
    partial = page.with_name(page.name + ".partial")
    # A path in the command may hold bytes that are no text.
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    partial.replace(page)
