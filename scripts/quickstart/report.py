"""Ends the quickstart: a short table, one question answered both ways, and where everything lies."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

REQUIRED = 0.9


def read(folder: Path, name: str) -> dict[str, Any]:
    """Scores that `scripts/evaluate.py --json` or `evaluate_draft.py --json` wrote."""
    scores: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return scores


def same_answers(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """To how many questions two models gave the same answer."""
    pairs = zip(one["answers"], other["answers"], strict=True)
    return sum(a["answer"] == b["answer"] for a, b in pairs)


def print_accuracies(title: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
    """A row for each model, by its label."""
    print(f"\n== result\n{title:<36}{'correct':>10}{'accuracy':>10}")
    for label, own in scores.items():
        print(f"{label:<36}{own['correct']:>6}/{own['rows']}{own['accuracy']:>10.1%}")


def end(report: Callable[[Path], bool], should_be: str) -> int:
    """Print a report of the folder and the seconds that the command line names; returns the status."""
    folder, seconds = Path(sys.argv[1]), int(sys.argv[2])
    good = report(folder)
    print(f"took {seconds // 60} min {seconds % 60} s")
    if not good:
        print(f"this is not what it should be: {should_be}")
    return 0 if good else 1


def report(folder: Path) -> bool:
    """Print the report; whether training did what it should."""
    before, after, plain = (read(folder, name) for name in ("before", "after", "transformers"))
    same = same_answers(after, plain)
    print_accuracies(
        "held-out exact match",
        {
            "before training": before,
            "after training (Megatron)": after,
            "after training (transformers)": plain,
        },
    )
    print(f"\nthe same answer both ways on {same} of {after['rows']} questions; one of them:")
    shown = next((i for i, row in enumerate(after["answers"]) if row["correct"]), 0)
    row = json.loads((folder / "task" / "test.jsonl").read_text().splitlines()[shown])
    for message in row["messages"][:-1]:
        print(f"  {message['role']:<13} {message['content']}")
    print(f"  {'Megatron':<13} {after['answers'][shown]['answer']}")
    print(f"  {'transformers':<13} {plain['answers'][shown]['answer']}")
    run = folder / "run"
    print(f"\n{run}/checkpoints    Megatron checkpoints, resumable at any parallel layout")
    print(f"{run}/hf             the finetuned model as a HuggingFace folder")
    print(
        f"{run}/metrics.jsonl  every step; {run}/report.html its curves; {run}/train.log all output"
    )
    print(f"{run}/config.yaml    everything the run resolved to")
    return before["accuracy"] < 0.05 and after["accuracy"] > REQUIRED and same == after["rows"]


if __name__ == "__main__":
    sys.exit(end(report, "under 5% before, over 90% after, the same both ways"))
