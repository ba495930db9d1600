"""Ends the LoRA quickstart: a short table, and where everything lies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from scripts.quickstart.kinds import KEPT_BACK
from scripts.quickstart.report import end, read, same_answers

MOST_BEFORE, LEAST_AFTER, MOST_LOST = 0.2, 0.9, 0.02


def accuracy(scores: dict[str, Any], *, kept_back: bool) -> float:
    """Share of right answers among the two kinds, or among the ten others."""
    rows = [row for row in scores["answers"] if (row["kind"] in KEPT_BACK) == kept_back]
    return float(sum(row["correct"] for row in rows) / len(rows))


def report(folder: Path) -> bool:
    """Print the report; whether training did what it should."""
    every = {
        "before the adapter": read(folder, "before"),
        "with it (Megatron)": read(folder, "after"),
        "with it (transformers and peft)": read(folder, "peft"),
    }
    before, after, plain = every.values()
    same = same_answers(after, plain)
    print("\n== result")
    print(f"{'held-out exact match':<34}{' and '.join(KEPT_BACK):>18}{'the ten others':>18}")
    for label, scores in every.items():
        two, ten = (accuracy(scores, kept_back=k) for k in (True, False))
        print(f"{label:<34}{two:>18.1%}{ten:>18.1%}")
    print(f"\nthe same answer both ways on {same} of {after['rows']} questions")
    print(f"{folder}/ten/hf       the base: the model that learned ten kinds")
    print(f"{folder}/run/adapter  the adapter as PEFT and vLLM load it")
    learned, kept = ([accuracy(s, kept_back=k) for s in every.values()] for k in (True, False))
    good = learned[0] < MOST_BEFORE and min(learned[1:]) > LEAST_AFTER and same == after["rows"]
    return good and min(kept[1:]) > kept[0] - MOST_LOST


SHOULD_BE = (
    "the two kinds under 20% before and over 90% after, the ten within 2%, the same both ways"
)

if __name__ == "__main__":
    sys.exit(end(report, SHOULD_BE))
