"""Keeps two kinds of the quickstart's training rows back: one file without them, one to teach them by.

    python scripts/quickstart/kinds.py --data DIR/train.jsonl

Writes DIR/ten.jsonl and DIR/two.jsonl, in which one row of three is of the ten kinds: what is not practised
is forgotten.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

KEPT_BACK = ("swap", "total")


def split(path: Path) -> None:
    """Write both files beside the rows of all kinds."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    two = [line for line in lines if json.loads(line)["kind"] in KEPT_BACK]
    ten = [line for line in lines if json.loads(line)["kind"] not in KEPT_BACK]
    path.with_name("ten.jsonl").write_text("".join(ten), encoding="utf-8")
    path.with_name("two.jsonl").write_text("".join(two + ten[: len(two) // 2]), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Keeps two kinds of training rows back.")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="of all kinds")
    split(parser.parse_args(argv).data)


if __name__ == "__main__":
    main()
