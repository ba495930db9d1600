"""Low-rank factors on every layout against peft in a plain loop, and what is made of them afterwards.

Faults of other trainers that these tests fail on: gradients of whole factors wrong under sequence
parallelism; a start that depends on the layout; factors of fused layers in another order than their rows;
parameters that are used before they are gathered; a checkpoint that holds the base.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from post_training.adapters.settings import LoraSettings
from post_training.inference.backends import TransformersBackend
from post_training.inference.generate import Sampling
from tests.helpers import plain_lora, reference
from tests.helpers.checkpoint import tensors
from tests.helpers.launch import finetune, run_script
from tests.helpers.models import load_model
from tests.helpers.reference import Recipe
from tests.numerics.adapters import CASES, LAST, Case, Matrix, hf
from tests.numerics.equivalence import (
    CP2,
    EP2,
    FSDP2,
    HF,
    PP2,
    SP,
    STEP_BOUND,
    TE,
    TP2,
    UPDATE_BOUNDS,
)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else [])
        for case in CASES
    ],
)
def test_equals_peft_in_a_plain_loop(case, matrix, tmp_path):
    found = matrix.compare(case, tmp_path / "out")
    assert found.loss < STEP_BOUND
    assert found.grad_norm < STEP_BOUND
    assert found.update < UPDATE_BOUNDS["adam"]
    if case.settings is not LAST and case.family != "gpt2":  # whose gradients are small
        assert found.run.steps[0]["grad_norm"] > 0.2, "clipping is part of what is compared"
    held = tensors(max((found.run.folder / "checkpoints").glob("iter_*[0-9]")))
    kinds = ("adapter.", ".lora_", "optimizer.state.", "rng_state.")
    assert held and all(any(kind in key for kind in kinds) for key in held)
    assert sum("exp_avg." in f"{key}." for key in held) == len(found.truth.end)


LAYOUTS: dict[str, list[tuple[tuple[str, ...], int]]] = {
    "megatron": [(EP2 + TP2, 4), (PP2, 2), (TE, 1), (TP2 + SP, 2)],
    "fsdp2": [(FSDP2, 2), (FSDP2, 1), (FSDP2 + CP2, 2), (FSDP2, 1)],
    "transformers": [(HF, 4), (HF, 1), (HF, 2), (HF, 1)],
}


@pytest.fixture(scope="module", params=LAYOUTS)
def trained(request, matrix, tmp_path_factory):
    """Twenty steps, five in each of four layouts; exported as a whole model and as an adapter."""
    folder, recipe = tmp_path_factory.mktemp("trained") / "out", Recipe(lr=2e-2, steps=20)
    for flags, world in LAYOUTS[request.param]:
        case = Case("", flags, world, family="qwen3_moe")
        run = matrix.train(case, folder, "--exit-interval", "5", recipe=recipe)
    for words in ([], ["--adapter"])[: 1 + plain_lora.HAS_PEFT]:
        done = run_script("scripts/export_hf.py", "--output-dir", str(folder), *words)
        assert done.returncode == 0 and "FutureWarning" not in done.stderr, done.stderr
    return run, replace(case, flags=HF if request.param == "transformers" else (), world=1)


@pytest.mark.slow
def test_goes_on_in_another_layout(matrix, trained, tmp_path):
    trained, case = trained
    straight = matrix.train(case, tmp_path / "out", recipe=Recipe(lr=2e-2, steps=20))
    assert reference.relative(trained.losses, straight.losses) < STEP_BOUND
    found, expected = (plain_lora.factors_in(run.folder) for run in (trained, straight))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-4), key


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 60).unsqueeze(0), use_cache=False).logits


@pytest.mark.slow
def test_merged_and_stored_it_is_the_trained_model(matrix, trained):
    trained, case = trained
    base = load_model(matrix.model(case))
    untouched = logits(base)
    held = plain_lora.adapt(base, case.adapter, peft=case.adapter.backend == "transformers")
    with torch.no_grad():
        for key, value in plain_lora.factors_in(trained.folder).items():
            held[key].copy_(value)
    expected = logits(base)
    merged = logits(load_model(trained.folder / "hf"))
    assert (expected - untouched).abs().max() > 0.1, "B is not zero"
    assert (merged - expected).abs().max() / expected.abs().max() < 1e-5
    if not plain_lora.HAS_PEFT:
        pytest.skip("peft is not installed")
    stored = load_file(trained.folder / "adapter" / "adapter_model.safetensors")
    assert stored.keys() == {f"base_model.model.{key}" for key in held}
    from peft import PeftModel

    again = PeftModel.from_pretrained(load_model(matrix.model(case)), trained.folder / "adapter")
    answering = TransformersBackend.load(str(trained.folder / "adapter"), Sampling(), 1).model
    for model in (again, answering):
        assert (logits(model) - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not plain_lora.HAS_PEFT, reason="peft is not installed")
def test_an_adapter_of_peft_goes_on(matrix, tmp_path):
    """With patterns of ranks and names of whole modules, as other trainers write them."""
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj", "lm_head"],
        rank_pattern={"layers.0.self_attn.q_proj": 7},
        alpha_pattern={"v_proj": 12},
        init_lora_weights=False,
    )
    folder = matrix.model(Case("", family="llama"))
    get_peft_model(load_model(folder), config).save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")

    def adapt(model):
        inject_adapter_in_model(config, model)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert len(named) == len(stored) - 1, "and a copy of the output layer"
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(stored["base_model.model." + name.replace(".default", "")])
        return named

    recipe = Recipe(steps=3)
    truth = reference.train(folder, matrix.rows, matrix.data_file, recipe, adapt)
    run = finetune(
        tmp_path / "out",
        *("--hf-model", str(folder), "--finetune-data-files", str(matrix.data_file)),
        *("--lora-adapter", str(tmp_path / "adapter"), *recipe.flags(), *TP2, *SP),
        world=2,
    ).ok()
    assert reference.relative(run.losses, truth.losses) < STEP_BOUND
    norms = [step["grad_norm"] for step in run.steps]
    assert reference.relative(norms, truth.grad_norms) < STEP_BOUND
    done = run_script("scripts/export_hf.py", "--output-dir", str(run.folder), "--adapter")
    assert done.returncode == 0, done.stderr
    written = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert written["rank_pattern"] == config.rank_pattern


@pytest.mark.slow
def test_ranks_that_read_the_same_drop_the_same(matrix, tmp_path):
    """Else the whole factors, of which each rank has a copy, would part."""
    settings = LoraSettings(4, 8.0, ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    dropout, recipe = ("--lora-dropout", "0.2"), Recipe(lr=2e-2, steps=4)
    runs = [
        matrix.train(
            Case("", flags, world, settings=settings),
            tmp_path / f"{world}",
            *dropout,
            recipe=recipe,
        )
        for flags, world in (((), 1), (TP2, 2))
    ]
    assert reference.relative(runs[1].losses, runs[0].losses) < STEP_BOUND
    plain = matrix.train(Case("", settings=settings), tmp_path / "plain", recipe=recipe)
    assert reference.relative(plain.losses, runs[0].losses) > STEP_BOUND, "something is dropped"


@pytest.mark.slow
@pytest.mark.skipif(not plain_lora.HAS_PEFT, reason="peft is not installed")
def test_a_start_has_the_same_bits_on_any_number_of_processes(matrix, tmp_path):
    still = Recipe(lr=0.0, steps=1)
    one, two = (
        plain_lora.factors_in(
            matrix.train(hf(n, "qwen3_moe"), tmp_path / f"{n}", recipe=still).folder
        )
        for n in (1, 2)
    )
    assert one.keys() == two.keys() and len(one) == 2 * 6 * 2
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all((one[key] == 0).all() == ("lora_B" in key) for key in one)
