"""Ends the picture quickstart: a short table, one question, and where everything lies."""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.quickstart.report import REQUIRED, read

CHANCE, NEAR = 0.25, 0.05


def main() -> int:
    """Print the report; the status is 1 when training did not do what it should."""
    folder, seconds = Path(sys.argv[1]), int(sys.argv[2])
    names = ("before", "after", "shuffled", "transformers")
    before, after, shuffled, plain = (read(folder, name) for name in names)
    pairs = zip(after["answers"], plain["answers"], strict=True)
    same = sum(a["answer"] == b["answer"] for a, b in pairs)
    print("\n== result")
    print(f"{'held-out pictures':<36}{'right':>10}{'accuracy':>10}")
    for label, scores in (
        ("before training", before),
        ("after training", after),
        ("after training, pictures shuffled", shuffled),
        ("exported (plain transformers)", plain),
    ):
        print(f"{label:<36}{scores['correct']:>6}/{scores['rows']}{scores['accuracy']:>10.1%}")
    print(f"\nthe exported model gives the same answer to {same} of {after['rows']} questions")
    run = folder / "run"
    print(
        f"{run}/hf             the finetuned model as a HuggingFace folder, image processor included"
    )
    print(f"{run}/checkpoints    resumable with any number of processes")
    print(f"{folder}/after.json      every answer")
    print(f"took {seconds // 60} min {seconds % 60} s")
    near = abs(shuffled["accuracy"] - CHANCE) <= NEAR
    good = before["accuracy"] <= CHANCE + NEAR and after["accuracy"] > REQUIRED and near
    good = good and same == after["rows"]
    if not good:
        print(
            "this is not what it should be: over 90% after, near 25% with shuffled pictures and before, "
            "the same both ways"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
