"""LoRA on every layout against peft in a plain loop over the HuggingFace model, as `equivalence.py` does.

    python tests/numerics/adapters.py --table              all cases; exit status 1 if one differs
    python tests/numerics/adapters.py --table --only cp2   the cases with "cp2" in their name

Of experts, which transformers fuses, the plain loop adds the products of the factors to the weights.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import transformers

from post_training.adapters.settings import LoraSettings
from tests.helpers import plain_lora, reference
from tests.helpers.launch import Finished, finetune
from tests.helpers.models import save_model
from tests.helpers.reference import Recipe, Trajectory
from tests.helpers.rows import make_rows, write_rows
from tests.numerics.equivalence import (
    ALLGATHER,
    CP2,
    EP2,
    ETP1,
    ETP2,
    FIRST1,
    MBS2,
    OVERLAP,
    PP2,
    RECOMPUTE,
    SP,
    STEP_BOUND,
    TP2,
    UPDATE_BOUNDS,
    VPP2,
)

# Ten times the rate of full finetuning; the norm of the first step's gradient is above the clipping.
RECIPE = Recipe(lr=2e-2, clip=0.2)
PLAIN = LoraSettings(4, 8.0, ("all",))
ATTENTION = LoraSettings(4, 8.0, ("attention",))
SOME = LoraSettings(3, 8.0, ("q_proj", "v_proj", "up_proj", "lm_head", "embed_tokens"), rslora=True)
LAST = LoraSettings(4, 8.0, r"model\.layers\.1\.mlp\..*_proj")


@dataclass(frozen=True)
class Case:
    """An adapter of one model on one parallel layout."""

    layout: str
    flags: tuple[str, ...] = ()
    world: int = 1
    family: str = "qwen3"
    settings: LoraSettings = PLAIN
    layers: int = 2
    slow: bool = True

    @property
    def name(self) -> str:
        """What pytest and --only call it."""
        kinds = (("all", PLAIN), ("attention", ATTENTION), ("some", SOME), ("last", LAST))
        kind = next(name for name, settings in kinds if settings == self.settings)
        return f"{self.family}-{self.layout}-{kind}"


CASES = (
    Case("one", slow=False),
    Case("one", settings=SOME),
    Case("one-recompute", RECOMPUTE, settings=LAST),
    Case("dp2", (), 2),
    Case("dp2-overlap", OVERLAP, 2),
    Case("tp2", TP2, 2, settings=SOME),
    Case("tp2-sp", TP2 + SP, 2, slow=False),
    Case("tp2-sp", TP2 + SP, 2, settings=SOME, slow=False),
    Case("tp2-sp-recompute", TP2 + SP + RECOMPUTE, 2),
    Case("pp2", PP2, 2, settings=SOME),
    Case("cp2-mbs2", CP2 + MBS2, 2, slow=False),
    Case("tp2-pp2-mbs2", TP2 + PP2 + MBS2, 4),
    Case("tp2-sp-cp2", TP2 + SP + CP2, 4),
    Case("pp2-vpp2", PP2 + VPP2, 2, layers=4),
    Case("one", family="llama"),
    Case("tp2-sp-pp2", TP2 + SP + PP2, 4, family="llama"),
    Case("pp2-first1", PP2 + FIRST1, 2, family="llama", layers=3, slow=False),
    Case("one", family="qwen2"),
    Case("tp2", TP2, 2, family="qwen2"),
    Case("cp2", CP2, 2, family="qwen2"),
    Case("one", family="qwen3_moe", settings=ATTENTION),
    Case("ep2", EP2, 2, family="qwen3_moe", settings=ATTENTION),
    Case("one", family="qwen3_moe"),
    Case("ep2", EP2, 2, family="qwen3_moe", slow=False),
    Case("ep2-allgather", EP2 + ALLGATHER, 2, family="qwen3_moe"),
    Case("tp2-sp", TP2 + SP, 2, family="qwen3_moe"),
    Case("ep2-tp2-etp1", EP2 + TP2 + ETP1, 2, family="qwen3_moe"),
    Case("ep2-tp2", EP2 + TP2, 4, family="qwen3_moe"),
    Case("etp2", ETP2, 2, family="qwen3_moe"),
    Case("ep2-cp2", EP2 + CP2, 4, family="qwen3_moe"),
    Case("tp2-sp", TP2 + SP, 2, family="deepseek_v3", settings=ATTENTION),
    Case("tp2-sp", TP2 + SP, 2, family="gpt_oss", settings=ATTENTION),
    Case("ep2-pp2", EP2 + PP2, 4, family="qwen3_moe"),
)


@dataclass(frozen=True)
class Comparison:
    """How far a run is from the truth."""

    run: Finished
    truth: Trajectory
    loss: float
    grad_norm: float
    update: float
    """Relative L2 difference of the factors' whole change."""

    def holds(self) -> bool:
        """Whether all differences are within their bounds."""
        return max(self.loss, self.grad_norm) < STEP_BOUND and self.update < UPDATE_BOUNDS["adam"]


def lora_flags(settings: LoraSettings) -> tuple[str, ...]:
    """The same for `finetune.py`."""
    targets = (settings.targets,) if isinstance(settings.targets, str) else settings.targets
    rslora = ("--rslora",) if settings.rslora else ()
    sizes = ("--lora-rank", str(settings.rank), "--lora-alpha", str(settings.alpha))
    return (*sizes, "--lora-targets", *targets, *rslora)


class Matrix:
    """Runs cases; models and truths are made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = make_rows(60)
        self.data_file = write_rows(folder / "train.jsonl", self.rows)
        self.truth = functools.cache(self._truth)

    def model(self, family: str, layers: int = 2) -> Path:
        """The folder of a model."""
        folder = self.folder / f"{family}-{layers}"
        if not folder.exists():
            save_model(folder, family, num_hidden_layers=layers)
        return folder

    def _truth(self, family: str, layers: int, targets: str) -> Trajectory:
        settings = next(c.settings for c in CASES if str(c.settings.targets) == targets)
        adapt = functools.partial(plain_lora.adapt, settings=settings)
        return reference.train(self.model(family, layers), self.rows, self.data_file, RECIPE, adapt)

    def train(self, case: Case, output: Path, *flags: str, recipe: Recipe = RECIPE) -> Finished:
        """Train `case` through finetune.py."""
        return finetune(
            output,
            *("--hf-model", str(self.model(case.family, case.layers))),
            *("--finetune-data-files", str(self.data_file), *recipe.flags()),
            *(*lora_flags(case.settings), *case.flags, *flags),
            world=case.world,
        ).ok()

    def compare(self, case: Case, output: Path) -> Comparison:
        """Train `case` and read its checkpoint, whatever wrote it."""
        truth = self.truth(case.family, case.layers, str(case.settings.targets))
        run = self.train(case, output)
        norms = [step["grad_norm"] for step in run.steps]
        found = plain_lora.factors_in(run.folder)
        assert found.keys() >= truth.end.keys(), truth.end.keys() - found.keys()
        cut = {k: found[k][: v.shape[0], : v.shape[1]] for k, v in truth.end.items()}
        return Comparison(
            run,
            truth,
            reference.relative(run.losses, truth.losses),
            reference.relative(norms, truth.grad_norms),
            reference.update_error(cut, truth),
        )


def print_table(cases: list[Case]) -> bool:
    """Run cases and print a line for each; returns whether all hold."""
    print(f"{'case':32} {'ranks':>5}  {'loss':>8}  {'grad norm':>9}  {'update':>8}", flush=True)
    good = 0
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder))
        for number, case in enumerate(cases):
            found = matrix.compare(case, Path(folder, f"run{number}"))
            good += found.holds()
            print(
                f"{case.name:32} {case.world:5}  {found.loss:8.1e}  {found.grad_norm:9.1e}  "
                f"{found.update:8.1e}  {'equal' if found.holds() else 'DIFFERS'}",
                flush=True,
            )
    print(f"{good} of {len(cases)} cases equal peft in a plain loop over {RECIPE.steps} steps")
    return good == len(cases)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--table", action="store_true", required=True, help="run and print all")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their name")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        parser.error(f"--only {options.only}: no such case")
    return 0 if print_table(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
