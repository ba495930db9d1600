"""Quantisation-aware training: equal scales on layouts, and after a resume; exports that compute it."""

import json

import pytest
import torch

from tests.helpers.checkpoint import same_tensors, tensors
from tests.helpers.launch import run_script
from tests.numerics.equivalence import SP, TP2
from tests.numerics.quantised import BOUND, CASES, Case, Matrix

IN_SUITE = {("tp2-sp", "qwen3"): "INT8_DEFAULT_CFG", ("ep2", "qwen3_moe"): "INT8_WEIGHT_ONLY_CFG"}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "form"),
    [(c, IN_SUITE[c.layout, c.family]) for c in CASES if (c.layout, c.family) in IN_SUITE]
    + [(next(c for c in CASES if c.layout == "pp2"), "blocks.yaml")],
)
def test_scales_are_those_of_one_process(matrix, tmp_path, case, form):
    truth = matrix.train(Case("one", family=case.family), form, tmp_path / "one")
    assert "isolation checked" in truth.console
    scale, loss = matrix.differences(matrix.train(case, form, tmp_path / "two"), truth)
    assert scale < BOUND and loss < BOUND


@pytest.mark.slow
def test_goes_on_bit_for_bit_and_is_exported(matrix, tmp_path):
    """Behind the checkpoint of one process, in two; the later `--train-iters` wins."""
    flags = ("--train-iters", "3", "--lr-decay-iters", "3")
    straight = matrix.train(Case("one"), "INT8_DEFAULT_CFG", tmp_path / "a", *flags)
    stop = (*flags, "--exit-interval", "1")
    matrix.train(Case("one"), "INT8_DEFAULT_CFG", tmp_path / "b", *stop)
    again = matrix.train(Case("one"), "INT8_DEFAULT_CFG", tmp_path / "b", *flags)
    assert "quantised by" not in again.console
    last = "checkpoints/iter_0000003"
    assert same_tensors(straight.folder / last, again.folder / last)
    done = run_script("scripts/export_hf.py", "--output-dir", str(again.folder), "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    config = json.loads((again.folder / "hf/config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    told = json.loads((again.folder / "hf/hf_quant_config.json").read_text())
    assert told["quantization"]["exclude_modules"] == ["lm_head"]
    report = json.loads((straight.folder / "quantisation.json").read_text())
    assert report.keys() == {"format", "documents", "before", "quantised", "trained"}

    with pytest.raises(AssertionError, match="is of a model that is weights in 8"):
        matrix.train(Case("one"), "blocks.yaml", again.folder, *flags)


@pytest.mark.slow
def test_scales_of_a_gated_layer_are_cut_with_its_rows(matrix, tmp_path):
    """Read by two ranks and written again: a scale is the largest value of its own row, in both halves."""
    one, two = Case("one"), Case("tp2-sp", TP2 + SP, 2)
    still = ("--train-iters", "2", "--lr", "1e-30", "--weight-decay", "0")
    out = tmp_path / "out"
    matrix.train(one, "INT8_DEFAULT_CFG", out, *still, "--exit-interval", "1")
    straight = matrix.train(one, "INT8_DEFAULT_CFG", tmp_path / "straight", *still)
    run = matrix.train(two, "INT8_DEFAULT_CFG", out, *still)
    # With scales of other rows the second step's loss is another one.
    first, second = (
        tensors(out / "checkpoints/iter_0000001"),
        tensors(run.folder / "checkpoints/iter_0000002"),
    )
    names = [name for name in first if "linear_fc1.weight_quantizer" in name]
    assert len(names) == 4 and all(torch.equal(first[name], second[name]) for name in names)
    # With the scales of other rows the second rank's gate would be rounded by those of the up projection.
    assert run.steps[1]["lm_loss"] == pytest.approx(straight.steps[1]["lm_loss"], rel=5e-3)
