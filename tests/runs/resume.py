"""The resume table: stopped in one layout and continued in another, against a run that was not stopped.

    python tests/runs/resume.py --table              each layout to every layout; status 1 if one differs
    python tests/runs/resume.py --table --only cp2   the pairs with "cp2" in them

Three tables: a dense model; one with experts; and FSDP2, whose checkpoints have a format of their own. On
the diagonal (the same layout) dropout is on, and losses, gradient norms and the final weights must be
the same bit for bit: the random states of all ranks come back. Elsewhere dropout is off, and loss and
gradient norm of every step after the change must be within 1e-5 of an uninterrupted run on one process.
`tests/runs/test_resume.py` runs parts of it under pytest.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, where tests/data would hide the package data.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import transformers

from tests.helpers import reference
from tests.helpers.launch import Finished, finetune
from tests.helpers.models import save_model
from tests.helpers.reference import Recipe
from tests.helpers.rows import make_rows, write_rows
from tests.numerics.equivalence import CP2, EP2, FSDP2, MBS2, PP2, SP, STEP_BOUND, TP2, VPP2

RECIPE = Recipe(steps=8)
STOP = 3
DROPOUT = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1")
NUMBERS = ("iteration", "consumed_samples", "lm_loss", "grad_norm", "lr", "trained_tokens")
"""What a step's numbers are, apart from how long it took."""


@dataclass(frozen=True)
class Layout:
    """One parallel layout; a further one is a further line in `LAYOUTS`."""

    name: str
    flags: tuple[str, ...] = ()
    world: int = 1
    table: str = "dense"
    """A run goes on in layouts of the same table."""


LAYOUTS = (
    Layout("one"),
    Layout("mbs2", MBS2),
    Layout("dp2", (), 2),
    Layout("tp2", TP2, 2),
    Layout("tp2-sp", TP2 + SP, 2),
    Layout("pp2", PP2, 2),
    Layout("cp2", CP2, 2),
    Layout("vpp2", PP2 + VPP2, 2),
    Layout("one", (), 1, "experts"),
    Layout("dp2", (), 2, "experts"),
    Layout("tp2", TP2, 2, "experts"),
    Layout("ep2", EP2, 2, "experts"),
    Layout("ep2-cp2", EP2 + CP2, 2, "experts"),
    Layout("x1", FSDP2, 1, "fsdp2"),
    Layout("x2", FSDP2, 2, "fsdp2"),
    Layout("x2-cp2", FSDP2 + CP2, 2, "fsdp2"),
)
TABLES = {
    name: [layout for layout in LAYOUTS if layout.table == name]
    for name in ("dense", "experts", "fsdp2")
}


def numbers(run: Finished) -> list[tuple[float, ...]]:
    """The numbers of every step."""
    return [tuple(step[name] for name in NUMBERS) for step in run.steps]


def difference(run: Finished, straight: Finished) -> float:
    """The largest relative difference of a step's loss or gradient norm."""
    norms = [[step["grad_norm"] for step in r.steps] for r in (run, straight)]
    losses = reference.relative(run.losses, straight.losses)
    return max(losses, reference.relative(norms[0], norms[1]))


class Resumes:
    """Runs that are stopped and continued; what they are compared with is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # As many layers as two stages of two pieces take.
        save_model(folder / "dense", "qwen3", num_hidden_layers=4)
        save_model(folder / "experts", "qwen3_moe")
        data = write_rows(folder / "train.jsonl", make_rows(60))
        self.words = ("--finetune-data-files", str(data), *RECIPE.flags())
        self.straight = functools.cache(self._straight)
        self.stopped = functools.cache(self._stopped)

    def run(self, folder: Path, layout: Layout, *flags: str) -> Finished:
        """Train in `layout`."""
        model = self.folder / ("experts" if layout.table == "experts" else "dense")
        words = ("--hf-model", str(model), *self.words, *layout.flags, *flags)
        return finetune(folder, *words, world=layout.world).ok()

    def _place(self, what: str, layout: Layout, flags: tuple[str, ...]) -> Path:
        return self.folder / f"{what}-{layout.table}-{layout.name}{''.join(flags)}"

    def _straight(self, layout: Layout, *flags: str) -> Finished:
        return self.run(self._place("straight", layout, flags), layout, *flags)

    def _stopped(self, layout: Layout, *flags: str) -> Finished:
        folder = self._place("stopped", layout, flags)
        return self.run(folder, layout, "--exit-interval", str(STOP), *flags)

    def compare(self, before: Layout, after: Layout, *flags: str) -> tuple[float, bool]:
        """Stop in `before` and go on in `after`, with further flags for both.

        Returns:
            The largest relative difference of a step, and whether it is small enough.
        """
        same = before == after
        flags = (*flags, *DROPOUT) if same else flags
        folder = self.folder / "compared"
        shutil.copytree(self.stopped(before, *flags).folder, folder)
        run = self.run(folder, after, *flags)
        straight = self.straight(after if same else TABLES[after.table][0], *flags)
        found = difference(run, straight)
        holds = numbers(run) == numbers(straight) if same else found < STEP_BOUND
        shutil.rmtree(folder)
        return found, holds


def print_tables(only: str) -> bool:
    """Run all pairs and print a line for each layout that a run was stopped in; returns if all hold."""
    pairs = good = 0
    with tempfile.TemporaryDirectory() as folder:
        resumes = Resumes(Path(folder))
        for name, layouts in TABLES.items():
            wanted = [
                [only in f"{name} {before.name} {after.name}" for after in layouts]
                for before in layouts
            ]
            if not any(map(any, wanted)):
                continue
            head = "".join(f"{layout.name:>9}" for layout in layouts)
            print(f"{name + ' from / to':19}{head}", flush=True)
            for before, row in zip(layouts, wanted, strict=True):
                cells = []
                for after, is_wanted in zip(layouts, row, strict=True):
                    if not is_wanted:
                        cells.append("-")
                        continue
                    found, holds = resumes.compare(before, after)
                    pairs, good = pairs + 1, good + holds
                    exact = "bits" if before == after and holds else f"{found:.1e}"
                    cells.append(exact if holds else f"{exact}!")
                print(f"{before.name:19}" + "".join(f"{cell:>9}" for cell in cells), flush=True)
    print(
        f"{good} of {pairs} hold: {RECIPE.steps} steps, stopped after {STOP}; 'bits': same layout, dropout "
        f"on, every loss and gradient norm the same bit for bit as uninterrupted; numbers: the largest "
        f"relative difference from an uninterrupted run on one process, which must be below {STEP_BOUND:g}"
    )
    return pairs > 0 and good == pairs


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--table", action="store_true", required=True, help="run and print all pairs"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="pairs with TEXT in 'TABLE FROM TO'"
    )
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    return 0 if print_tables(options.only) else 1


if __name__ == "__main__":
    sys.exit(main())
