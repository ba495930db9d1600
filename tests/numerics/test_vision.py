"""Models that see, on packs with pictures, against their own class in a plain loop, document by document.

The table of all of them: `python tests/numerics/test_vision.py [MODEL...]`.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import vision
from tests.helpers.launch import finetune
from tests.helpers.reference import Recipe, relative, update_error

RECIPE = Recipe(global_batch=4, seq_length=160)
ROWS = 60
SEEN = 0.25
"""Of the rows: some micro batches then have no picture, and some steps have them on one rank only."""


def run(folder, kind, world, frozen, *flags):
    """Relative distances of losses and gradient norms, that of the update, and the run."""
    model, data = folder / kind, folder / "data"
    if not model.is_dir():
        vision.save_model(model, kind)
    rows = vision.make_rows(data, ROWS, SEEN)
    name = f"{kind}-{world}-{frozen}-{len(flags)}"
    frozen_flags = ("--freeze", "vision") if frozen else ()
    files = ("--hf-model", str(model), "--finetune-data-files", str(data / "rows.jsonl"))
    cache = ("--data-cache-dir", str(folder / "cache"), "--save-hf", "--log-interval", "1")
    done = finetune(
        folder / name, *files, *cache, *RECIPE.flags(), *frozen_flags, *flags, world=world
    ).ok()
    truth = vision.train(model, data, rows, RECIPE, frozen)
    norms = [step["grad_norm"] for step in done.steps]
    found = load_file(folder / name / "hf" / "model.safetensors")
    errors = relative(done.losses, truth.losses), relative(norms, truth.grad_norms)
    return (*errors, update_error(found, truth)), found, truth


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "world", "frozen", "flags"),
    [
        ("qwen2_5_vl", 2, False, ()),
        ("qwen3_vl", 2, True, ("--fsdp-sharding", "none")),
    ],
)
def test_runs_are_the_plain_loop(tmp_path, kind, world, frozen, flags):
    errors, found, truth = run(tmp_path, kind, world, frozen, *flags)
    assert errors[0] < 1e-5 and errors[1] < 1e-5 and errors[2] < 1e-3, errors
    seen = [name for name in found if "visual" in name]
    assert seen
    same = [torch.equal(found[name], truth.start[name]) for name in seen]
    assert all(same) if frozen else not any(same)


def main():
    """Print the table of every combination; the status is 1 when one does not hold."""
    good = True
    print(
        f"{'model':<12}{'processes':>10}{'vision':>9}{'sharding':>10}{'loss':>10}{'norm':>10}{'update':>10}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for kind, world, frozen, sharding in itertools.product(
            sys.argv[1:] or vision.KINDS, (1, 2, 4), (False, True), ("full", "none")
        ):
            errors, *_ = run(Path(folder), kind, world, frozen, "--fsdp-sharding", sharding)
            good &= errors[0] < 1e-5 and errors[1] < 1e-5 and errors[2] < 1e-3
            part = "frozen" if frozen else "trained"
            shown = "".join(f"{error:>10.1e}" for error in errors)
            print(f"{kind:<12}{world:>10}{part:>9}{sharding:>10}{shown}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
