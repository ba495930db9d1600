"""Twenty kills with SIGKILL, at random moments and inside saves; after each the same command again.

    python tests/runs/kills.py --table           the kills with their outcome; exit status 1 if one is wrong
    python tests/runs/kills.py --table --seed 7  other moments

Each ends one rank or all. Ten hit a run with tensor parallelism that saves synchronously, ten one with
data parallelism and `--async-save`. After each kill the next start must go on after the newest checkpoint
that is whole on the disk, and at the end every step and all weights must be those of a run that was never
killed, bit for bit.
`tests/runs/test_kills.py` runs the same under pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # In place of this folder, where tests/data would hide the package data.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import transformers

from tests.helpers import faults
from tests.helpers.checkpoint import newest_whole, same_tensors
from tests.helpers.launch import LIMIT, Running, finetune, run_rank, start_finetune
from tests.helpers.models import save_model
from tests.helpers.reference import Recipe
from tests.helpers.rows import make_rows, write_rows
from tests.numerics.equivalence import TP2
from tests.runs.resume import DROPOUT, numbers

STEPS = 30
WORLD = 2
RUNS = {
    "tp2": (*TP2, "--save-interval", "3", "--keep-checkpoints", "2"),
    "dp2 async": ("--save-interval", "3", "--keep-checkpoints", "2", "--async-save"),
}
MOMENTS = ("saving",) * 5 + ("training",) * 3 + ("starting",) * 2
"""Of the kills of one run, in another order each time."""


@dataclass(frozen=True)
class Kill:
    """One kill and what became of it."""

    run: str
    moment: str
    ranks: str
    step: int
    """The last step in `metrics.jsonl`."""
    cut_off: str
    """The save that was going on when it hit, if one was."""
    newest: int
    """The newest checkpoint that is whole on the disk; 0 for none."""
    continued: int | None = None
    """Where the next start went on; None when that one was killed before it said so."""

    @property
    def right(self) -> bool:
        """Whether nothing was lost that was whole."""
        return self.continued in (None, self.newest)

    def line(self) -> str:
        """A line of the table."""
        went = "killed again" if self.continued is None else f"after {self.continued}"
        return (
            f"{self.run:10} {self.moment:9} {self.ranks:6} {self.step:4}  {self.cut_off:12} "
            f"{self.newest:6}  {went:13} {'right' if self.right else 'WRONG'}"
        )


HEADER = "run        moment    ranks  step  save cut off newest  next start    outcome"


def last_step(running: Running) -> int:
    """The last step that the run has written down."""
    file = running.folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.is_file() else []
    found = [int(match[1]) for line in lines if (match := re.search(r'"iteration": (\d+)', line))]
    return found[-1] if found else 0


def saves(running: Running) -> list[str]:
    """Saves that have begun and not finished."""
    return sorted(p.name for p in (running.folder / "checkpoints").glob("iter_*.saving"))


def continued_after(running: Running) -> int | None:
    """The step after which a start went on, as its console tells; None when it has not come so far."""
    console = running.consoles[0].read_text()
    if match := re.search(r"continuing after step (\d+)", console):
        return int(match[1])
    return 0 if re.search(r"step 1/", console) else None


def alive(running: Running) -> bool:
    """Whether all ranks are running."""
    return all(process.exitcode is None for process in running.processes)


def wait_until(running: Running, condition: Callable[[], bool]) -> None:
    """Wait for what comes for certain, as the run is held there."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        if not alive(running) or time.monotonic() > deadline:
            raise AssertionError(f"not reached\n{running.consoles[0].read_text()}")
        time.sleep(0.002)


def sigkill(process: Any) -> None:
    """End a rank at once, if it has not ended."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()


def start_to_kill(
    folder: Path, flags: list[str], moment: str, chance: random.Random
) -> tuple[Running, Path]:
    """Start a run that waits for its kill, however late that comes: in a save, or before the last step.

    Returns:
        The run, and the file that it makes when the save begins.
    """
    saving = folder.parent / "saving"
    saving.unlink(missing_ok=True)
    hold = f"step {STEPS}"
    if moment == "saving":
        # The first save of this start or the second, where there is one.
        second = chance.random() < 0.5 and newest_whole(folder / "checkpoints") <= STEPS - 6
        hold = f"save {1 + second} {saving}"
    environment = {faults.HOLD: hold}
    running = start_finetune(
        folder, *flags, world=WORLD, environment=environment, inject=faults.hold_for_a_kill
    )
    return running, saving


def kill_once(
    running: Running, saving: Path, name: str, moment: str, chance: random.Random
) -> Kill:
    """Wait for the moment, kill one rank or all, and look at what is left."""
    begin = last_step(running)
    if moment == "starting":
        time.sleep(chance.uniform(0.0, 1.0))
    elif moment == "training":
        wait_until(running, lambda: continued_after(running) is not None)
        reached = min(last_step(running) + chance.randint(1, 2), STEPS - 1)
        wait_until(running, lambda: last_step(running) >= reached)
        time.sleep(chance.uniform(0.0, 0.05))
    else:
        wait_until(running, saving.exists)
        time.sleep(chance.uniform(0.0, 0.15))
    assert alive(running), f"ended by itself\n{running.consoles[0].read_text()}"
    victim = chance.choice(["all", *map(str, range(WORLD))])
    if victim != "all":
        sigkill(running.processes[int(victim)])
        time.sleep(
            chance.uniform(0.0, 0.3)
        )  # the others notice, or not, before the launcher ends them
    for process in running.processes:
        sigkill(process)
    for process in running.processes:
        process.join(10)
    left = saves(running)
    cut = left[0].removesuffix(".saving").removeprefix("iter_").lstrip("0") if left else "-"
    newest = newest_whole(running.folder / "checkpoints")
    return Kill(name, moment, victim, max(begin, last_step(running)), cut, newest)


class Killed:
    """Runs that are killed again and again, and the runs that they are compared with."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        save_model(folder / "model", "qwen3")
        data = write_rows(folder / "train.jsonl", make_rows(60))
        model = ("--hf-model", str(folder / "model"))
        recipe = Recipe(steps=STEPS).flags()
        self.words = (*model, "--finetune-data-files", str(data), *recipe, *DROPOUT)

    def kill(self, name: str, tell: Callable[[Kill], None]) -> bool:
        """Kill one run ten times and let it end; returns whether it ends as the uninterrupted one.

        Args:
            name: of the run, in `RUNS`.
            tell: called with each kill, once it is known where the next start went on.
        """
        flags = [*self.words, *RUNS[name]]
        synchronous = [flag for flag in flags if flag != "--async-save"]
        straight = finetune(self.folder / f"straight {name}", *synchronous, world=WORLD).ok()
        folder = self.folder / f"killed {name}"
        moments = list(MOMENTS)
        self.chance.shuffle(moments)
        before: Kill | None = None
        for moment in moments:
            running, saving = start_to_kill(folder, flags, moment, self.chance)
            kill = kill_once(running, saving, name, moment, self.chance)
            if before is not None:
                tell(self._with_next(before, running))
            before = kill
        running = start_finetune(folder, *flags, world=WORLD)
        end = running.wait().ok()
        assert before is not None
        tell(self._with_next(before, running))
        newest = [f"checkpoints/iter_{STEPS:07d}", f"checkpoints/iter_{STEPS - 3:07d}"]
        pairs = [(straight.folder / path, folder / path) for path in newest]
        weights = all(run_rank(same_tensors, one, other) for one, other in pairs)
        return weights and numbers(end) == numbers(straight)

    @staticmethod
    def _with_next(kill: Kill, running: Running) -> Kill:
        return Kill(**{**kill.__dict__, "continued": continued_after(running)})


def print_table(seed: int) -> bool:
    """Run all kills and print a line for each; returns whether all is right."""
    print(f"seed {seed}\n{HEADER}", flush=True)
    told: list[Kill] = []

    def tell(kill: Kill) -> None:
        told.append(kill)
        print(kill.line(), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        killed = Killed(Path(folder), seed)
        same = [killed.kill(name, tell) for name in RUNS]
    right = sum(kill.right for kill in told)
    inside = sum(kill.cut_off != "-" for kill in told)
    print(
        f"{right} of {len(told)} kills right, {inside} of them inside a save; {sum(same)} of {len(same)} "
        f"runs end with every step and all weights the same bit for bit as without a kill"
    )
    return right == len(told) and all(same)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--table", action="store_true", required=True, help="run and print all kills"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the moments (default: 1234)")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    return 0 if print_table(options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
