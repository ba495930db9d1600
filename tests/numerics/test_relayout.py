"""A run that is stopped and goes on in another layout: experts spread anew, virtual stages cut anew.

Losses, gradient norms, evaluations and the exported weights are those of a run that nobody stopped.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import megatron_model, reference
from tests.helpers.launch import finetune, run_rank, run_script
from tests.helpers.reference import Recipe
from tests.helpers.rows import make_rows, write_rows
from tests.numerics.equivalence import CP2, EP2, MBS2, PP2, TP2, VPP1LAYER, VPP2

pytestmark = pytest.mark.slow
RECIPE = Recipe(steps=8, balance=0.01)
EVERY = 2


def train(folder: Path, model: Path, files: list[Path], layouts: list[tuple[tuple[str, ...], int]]):
    """Train 8 steps, two in each layout, and evaluate after each two."""
    recipe = RECIPE if "moe" in model.name else Recipe(steps=8)
    stop = ["--exit-interval", str(EVERY)] if len(layouts) > 1 else []
    for flags, world in layouts:
        run = finetune(
            folder,
            *("--hf-model", str(model), "--finetune-data-files", str(files[0])),
            *("--valid-data-files", str(files[1]), "--eval-interval", str(EVERY)),
            *(*recipe.flags(), *stop, *flags),
            world=world,
        ).ok()
    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory, chat_data):
    held_out = tmp_path_factory.mktemp("held out") / "valid.jsonl"
    return [chat_data.file, write_rows(held_out, make_rows(11, seed=2))]


@pytest.mark.parametrize(
    ("family", "options", "layouts"),
    [
        ("qwen3_moe", {}, [(EP2 + TP2, 4), (EP2 + CP2, 2), (TP2, 2), (PP2 + EP2 + MBS2, 4)]),
        (
            "qwen3",
            {"num_hidden_layers": 4},
            [(PP2 + VPP2, 2), ((), 1), (PP2 + VPP1LAYER + MBS2, 2), (PP2 + VPP2 + TP2, 4)],
        ),
    ],
    ids=["ep2tp2-ep2cp2-tp2-ep2pp2", "vpp2-one-vpp2mbs2-vpp2tp2"],
)
def test_goes_on_in_another_layout(hf_model, files, tmp_path, family, options, layouts):
    model = hf_model(family, **options)
    expected = train(tmp_path / "straight", model, files, [((), 1)])
    found = train(tmp_path / "changed", model, files, layouts)
    assert [step["iteration"] for step in found.steps] == list(range(1, 9))
    for name in ("lm_loss", "grad_norm", *(["moe_aux_loss"] if family == "qwen3_moe" else [])):
        one, other = ([step[name] for step in run.steps] for run in (found, expected))
        assert reference.relative(one, other) < 1e-5, name
    evaluated = [[e["iteration"], e["tokens"]] for e in found.evaluations]
    assert evaluated == [[e["iteration"], e["tokens"]] for e in expected.evaluations]
    losses = [[e["loss"] for e in run.evaluations] for run in (found, expected)]
    assert reference.relative(*losses) < 1e-5

    # The folder for HuggingFace: to the bit what one process reads from the checkpoint of the last
    # layout, and up to rounding what the run that nobody stopped learned.
    done = run_script("scripts/export_hf.py", "--output-dir", str(found.folder))
    assert done.returncode == 0, done.stderr
    exported = load_file(found.folder / "hf" / "model.safetensors")
    read = [
        run_rank(
            megatron_model.exported,
            megatron_model.flags(str(model), str(run.folder), "--no-load-optim"),
        )
        for run in (found, expected)
    ]
    start = load_file(model / "model.safetensors")
    wrong = right = 0.0
    for name, value in exported.items():
        assert torch.equal(value, read[0][name])
        end = read[1][name]
        wrong += (value - end).double().square().sum().item()
        right += (end - start[name]).double().square().sum().item()
    assert right > 0 and wrong / right < 1e-6
