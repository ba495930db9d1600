"""Kills scripts/extract_features.py again and again; the folder ends with the bytes of one never killed.

    python tests/data/features/extraction_kills.py             ten kills; the status is 1 if a byte differs
    python tests/data/features/extraction_kills.py --world 2   of two data parallel processes

Some kills hit the start, most the writing: at a random moment after a random number of further files.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, whose parents would hide the package data.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from tests.data.features.folders import tree
from tests.helpers.launch import ENVIRONMENT, ROOT, command
from tests.helpers.models import save_model
from tests.helpers.rows import make_rows, write_rows


def start(words: Sequence[str], folder: Path, world: int | None) -> subprocess.Popen[bytes]:
    """Extract into a folder, in a process group of its own."""
    return subprocess.Popen(
        command("scripts/extract_features.py", *words, "--output-dir", str(folder), world=world),
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def written(folder: Path) -> int:
    """Files of features that are complete."""
    return len(list((folder / "train").glob("features-*.json")))


def kill_once(
    words: Sequence[str], folder: Path, world: int | None, starting: bool, chance: random.Random
) -> int:
    """Start, and kill all processes at once; returns how many files were complete.

    Raises:
        AssertionError: it ended before.
    """
    process = start(words, folder, world)
    aim = written(folder) + chance.randint(1, 2)
    while not starting and written(folder) < aim and process.poll() is None:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 3.0 if starting else 0.05))
    assert process.poll() is None, "ended before it was killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return written(folder)


def killed_and_whole(root: Path, kills: int, seed: int, world: int | None = None) -> bool:
    """Kill one extraction so often, and compare it with another; prints a line for each kill."""
    chance = random.Random(seed)
    model = save_model(root / "model", "qwen3")
    data = write_rows(root / "train.jsonl", make_rows(1000))
    words = ["--hf-model", str(model), "--finetune-data-files", str(data), "--seq-length", "192"]
    words += [
        "--shard-megabytes",
        "1",
        "--features-dtype",
        "fp32",
        "--data-cache-dir",
        f"{root}/cache",
    ]
    assert start(words, root / "whole", world).wait() == 0
    for number in range(kills):
        starting = number % 5 == 4
        found = kill_once(words, root / "killed", world, starting, chance)
        moment = "starting" if starting else "writing"
        print(f"kill {number + 1:2}  {moment:8}  {found:3} files complete", flush=True)
    assert start(words, root / "killed", world).wait() == 0
    whole, killed = tree(root / "whole"), tree(root / "killed")
    print(f"{len(whole)} files, {'the same bytes' if whole == killed else 'OTHER BYTES'}")
    return whole == killed


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1234, help="of the moments")
    parser.add_argument("--world", type=int, help="processes, through torchrun (default: one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return int(not killed_and_whole(Path(folder), options.kills, options.seed, options.world))


if __name__ == "__main__":
    sys.exit(main())
