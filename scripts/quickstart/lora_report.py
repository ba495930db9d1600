"""Ends the LoRA quickstart: a short table, and where everything lies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from scripts.quickstart.kinds import KEPT_BACK

MOST_BEFORE, LEAST_AFTER, MOST_LOST = 0.2, 0.9, 0.02


def accuracy(scores: dict[str, Any], *, kept_back: bool) -> float:
    """Share of right answers among the two kinds, or among the ten others."""
    rows = [row for row in scores["answers"] if (row["kind"] in KEPT_BACK) == kept_back]
    return float(sum(row["correct"] for row in rows) / len(rows))


def main() -> int:
    """Print the report; the status is 1 when training did not do what it should."""
    folder, seconds = Path(sys.argv[1]), int(sys.argv[2])
    every: dict[str, dict[str, Any]] = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in ("before", "after", "peft")
    }
    same = sum(
        a["answer"] == b["answer"]
        for a, b in zip(every["after"]["answers"], every["peft"]["answers"], strict=True)
    )
    print("\n== result")
    print(f"{'held-out exact match':<34}{' and '.join(KEPT_BACK):>18}{'the ten others':>18}")
    for label, name in (
        ("before the adapter", "before"),
        ("with it (Megatron)", "after"),
        ("with it (transformers and peft)", "peft"),
    ):
        two, ten = (accuracy(every[name], kept_back=k) for k in (True, False))
        print(f"{label:<34}{two:>18.1%}{ten:>18.1%}")
    rows = every["after"]["rows"]
    print(f"\nthe same answer both ways on {same} of {rows} questions")
    print(f"{folder}/ten/hf       the base: the model that learned ten kinds")
    print(f"{folder}/run/adapter  the adapter as PEFT and vLLM load it")
    print(f"took {seconds // 60} min {seconds % 60} s")
    learned, kept = ([accuracy(s, kept_back=k) for s in every.values()] for k in (True, False))
    good = learned[0] < MOST_BEFORE and min(learned[1:]) > LEAST_AFTER and same == rows
    if not (good and min(kept[1:]) > kept[0] - MOST_LOST):
        print(
            "this is not what it should be: the two kinds under 20% before and over 90% after, the ten "
            "within 2%, the same both ways"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
