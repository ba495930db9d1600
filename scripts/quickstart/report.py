"""Ends the quickstart: a short table, one question answered both ways, and where everything lies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REQUIRED = 0.9


def read(folder: Path, name: str) -> dict[str, Any]:
    """Scores that `scripts/evaluate.py --json` wrote."""
    scores: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return scores


def main() -> int:
    """Print the report; the status is 1 when training did not do what it should."""
    folder, seconds = Path(sys.argv[1]), int(sys.argv[2])
    before, after, plain = (read(folder, name) for name in ("before", "after", "transformers"))
    same = sum(
        a["answer"] == b["answer"] for a, b in zip(after["answers"], plain["answers"], strict=True)
    )
    rows = json.loads(
        "[" + ",".join((folder / "task" / "test.jsonl").read_text().splitlines()) + "]"
    )
    shown = (
        next(i for i, row in enumerate(after["answers"]) if row["correct"])
        if after["correct"]
        else 0
    )
    print("\n== result")
    print(f"{'held-out exact match':<36}{'correct':>10}{'accuracy':>10}")
    for label, scores in (
        ("before training", before),
        ("after training (Megatron)", after),
        ("after training (transformers)", plain),
    ):
        print(f"{label:<36}{scores['correct']:>6}/{scores['rows']}{scores['accuracy']:>10.1%}")
    print(f"\nthe same answer both ways on {same} of {after['rows']} questions; one of them:")
    for message in rows[shown]["messages"][:-1]:
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
    print(f"took {seconds // 60} min {seconds % 60} s")
    good = before["accuracy"] < 0.05 and after["accuracy"] > REQUIRED and same == after["rows"]
    if not good:
        print("this is not what it should be: under 5% before, over 90% after, the same both ways")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
