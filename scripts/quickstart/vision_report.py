"""Ends the picture quickstart: a short table, and where everything lies."""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.quickstart.report import REQUIRED, end, print_accuracies, read, same_answers

CHANCE, NEAR = 0.25, 0.05


def report(folder: Path) -> bool:
    """Print the report; whether training did what it should."""
    names = ("before", "after", "shuffled", "transformers")
    before, after, shuffled, plain = (read(folder, name) for name in names)
    same = same_answers(after, plain)
    print_accuracies(
        "held-out pictures",
        {
            "before training": before,
            "after training": after,
            "after training, pictures shuffled": shuffled,
            "exported (plain transformers)": plain,
        },
    )
    print(f"\nthe exported model gives the same answer to {same} of {after['rows']} questions")
    run = folder / "run"
    print(f"{run}/hf             the finetuned model as a HuggingFace folder, with its processor")
    print(f"{run}/checkpoints    resumable with any number of processes")
    print(f"{folder}/after.json      every answer")
    near = abs(shuffled["accuracy"] - CHANCE) <= NEAR and before["accuracy"] <= CHANCE + NEAR
    return near and after["accuracy"] > REQUIRED and same == after["rows"]


SHOULD_BE = "over 90% after, near 25% with shuffled pictures and before, the same both ways"

if __name__ == "__main__":
    sys.exit(end(report, SHOULD_BE))
