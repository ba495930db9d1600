"""Ends the distillation quickstart: a short table, and where everything lies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MOST_BEFORE, LEAST_AFTER = 1.05, 2.8


def main() -> int:
    """Print the report; the status is 1 when training did not do what it should."""
    folder, seconds = Path(sys.argv[1]), int(sys.argv[2])
    found: dict[str, dict[str, Any]] = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ("untrained", "draft")
    }
    print("\n== result")
    print(f"{'of 4 drafted tokens':<24}{'acceptance length':>18}{'tokens a pass':>15}")
    for label, scores in (
        ("before training", found["untrained"]),
        ("after training", found["draft"]),
    ):
        print(f"{label:<24}{scores['acceptance_length']:>18.3f}{scores['emitted_per_pass']:>15.3f}")
    print("\nthe base's answers are the same with the draft and without")
    print(f"{folder}/features         hidden states by conversation, for any further training")
    print(f"{folder}/draft/draft      the draft as vLLM and SGLang load it, beside the base")
    print(f"{folder}/students         the students with and without a teacher")
    print(f"took {seconds // 60} min {seconds % 60} s")
    good = (
        found["untrained"]["acceptance_length"] <= MOST_BEFORE
        and found["draft"]["acceptance_length"] >= LEAST_AFTER
    )
    if not good:
        print(
            f"this is not what it should be: {MOST_BEFORE} or less before, {LEAST_AFTER} or more after"
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
