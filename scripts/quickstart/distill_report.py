"""Ends the distillation quickstart: a short table, and where everything lies."""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.quickstart.report import end, read

MOST_BEFORE, LEAST_AFTER = 1.05, 2.8


def report(folder: Path) -> bool:
    """Print the report; whether training did what it should."""
    before, after = read(folder, "untrained"), read(folder, "draft")
    print("\n== result")
    print(f"{'of 4 drafted tokens':<24}{'acceptance length':>18}{'tokens a pass':>15}")
    for label, scores in (("before training", before), ("after training", after)):
        print(f"{label:<24}{scores['acceptance_length']:>18.3f}{scores['emitted_per_pass']:>15.3f}")
    print("\nthe base's answers are the same with the draft and without")
    print(f"{folder}/features         hidden states by conversation, for any further training")
    print(f"{folder}/draft/draft      the draft as vLLM and SGLang load it, beside the base")
    print(f"{folder}/students         the students with and without a teacher")
    learned = before["acceptance_length"], after["acceptance_length"]
    return learned[0] <= MOST_BEFORE and learned[1] >= LEAST_AFTER


if __name__ == "__main__":
    sys.exit(end(report, f"{MOST_BEFORE} or less before, {LEAST_AFTER} or more after"))
