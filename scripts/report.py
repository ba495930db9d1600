"""Writes one self-contained HTML page of a run: no other file is needed to look at it, and no network.

python scripts/report.py --output-dir runs/first
python scripts/report.py --output-dir runs/first --answers scores.json --to page.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from post_training.arguments.ranges import read_options
from post_training.metrics.report import write_report


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output-dir", required=True, help="folder of the run")
    parser.add_argument("--to", help="file to write (default: OUTPUT_DIR/report.html)")
    parser.add_argument(
        "--answers",
        nargs="+",
        metavar="FILE",
        help="of evaluate.py --json (default: those in OUTPUT_DIR)",
    )
    options = read_options(parser)
    folder = Path(options.output_dir)
    answers = None if options.answers is None else [Path(file) for file in options.answers]
    if not (folder / "config.yaml").is_file():
        print(f"error: --output-dir {folder}: holds no run (no config.yaml)", file=sys.stderr)
        return 2
    for file in answers or ():
        if not file.is_file():
            print(f"error: --answers {file}: no such file", file=sys.stderr)
            return 2
    page = Path(options.to) if options.to else folder / "report.html"
    try:
        write_report(folder, page, answers)
    except OSError as error:
        print(f"error: {page}: {error.strerror}", file=sys.stderr)
        return 2
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
