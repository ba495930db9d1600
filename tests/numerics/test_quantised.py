"""Quantisation-aware training: equal scales on layouts, and after a resume; exports that compute it."""

import json

import pytest
import torch

from post_training.errors import SetupError
from tests.helpers import megatron_model
from tests.helpers.checkpoint import same_tensors
from tests.helpers.launch import run_rank, run_ranks, run_script
from tests.numerics.quantised import BOUND, CASES, Case, Matrix, scales

IN_SUITE = {("tp2-sp", "qwen3"): "INT8_DEFAULT_CFG", ("ep2", "qwen3_moe"): "INT8_WEIGHT_ONLY_CFG"}


def layout(family, name):
    return next(case for case in CASES if (case.family, case.layout) == (family, name))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "form"),
    [(c, IN_SUITE[c.layout, c.family]) for c in CASES if (c.layout, c.family) in IN_SUITE]
    + [(layout("qwen3", "pp2"), "blocks.yaml"), (layout("deepseek_v3", "tp2-sp"), "blocks.yaml")],
)
def test_scales_are_those_of_one_process(matrix, tmp_path, case, form):
    truth = matrix.train(Case("one", family=case.family), form, tmp_path / "one")
    assert "isolation checked" in truth.console
    scale, loss = matrix.differences(matrix.train(case, form, tmp_path / "two"), truth)
    assert scale < BOUND and loss < BOUND


@pytest.mark.slow
def test_messages_may_overlap(matrix, tmp_path):
    """Behind the last step nothing waits for gathers any more, and the loss is told still."""
    overlapped = Case("dp2", ("--overlap-grad-reduce", "--overlap-param-gather"), 2)
    truth = matrix.train(Case("one"), "INT8_DEFAULT_CFG", tmp_path / "one")
    run = matrix.train(overlapped, "INT8_DEFAULT_CFG", tmp_path / "two")
    scale, loss = matrix.differences(run, truth)
    assert scale < BOUND and loss < BOUND
    found, expected = (
        json.loads((r.folder / "quantisation.json").read_text())["trained"] for r in (run, truth)
    )
    assert found == pytest.approx(expected, rel=1e-3)


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
    assert report.keys() == {"format", "documents", "contents", "before", "quantised", "trained"}
    resumed = (again.folder / "quantisation.json").read_text()
    more = ("--train-iters", "4", "--lr-decay-iters", "3", "--calib-size", "1")
    other = matrix.train(Case("one"), "INT8_DEFAULT_CFG", again.folder, *more)
    assert "quantised by others, so that the losses do not compare" in other.console
    assert (again.folder / "quantisation.json").read_text() == resumed

    with pytest.raises(AssertionError, match="is of a model that is weights in 8"):
        matrix.train(Case("one"), "blocks.yaml", again.folder, *flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "layouts"),
    [
        (
            "INT8_DEFAULT_CFG",
            [Case("one"), *(layout("qwen3", name) for name in ("tp2-sp", "pp2", "dp2-mbs2"))],
        ),
        (
            "blocks.yaml",
            [
                *(layout("qwen3_moe", name) for name in ("ep2-tp2-etp1", "tp2-sp")),
                Case("one", family="qwen3_moe"),
            ],
        ),
    ],
    ids=["one-tp2-pp2-dp2", "ep2tp2-tp2-one"],
)
def test_goes_on_in_another_layout(matrix, tmp_path, form, layouts):
    """A step in each: scales stay what they are."""
    steps = len(layouts)
    # Weights do not move: losses differ by what is rounded the other way.
    still = ("--train-iters", str(steps), "--lr", "1e-30", "--weight-decay", "0")
    straight = matrix.train(layouts[0], form, tmp_path / "straight", *still)
    for case in layouts:
        run = matrix.train(case, form, tmp_path / "out", *still, "--exit-interval", "1")
    first, *later = (
        scales(run.folder / f"checkpoints/iter_{step:07}") for step in range(1, steps + 1)
    )
    assert any("linear_fc1.weight_quantizer" in name for name in first)
    for found in later:
        assert found.keys() == first.keys()
        assert all(torch.equal(found[name], value) for name, value in first.items())
    assert run.losses == pytest.approx(straight.losses, rel=5e-3)


def _rows_and_scales(argv):
    """Largest values of this rank's rows, and their scales, of matrices whose inputs are not cut."""
    built = megatron_model.set_up(argv)[1]
    return {
        name: (module.weight.detach().abs().amax(1), module.weight_quantizer._amax.flatten())
        for name, module in megatron_model.unwrapped(built).named_modules()
        if name.endswith(("linear_qkv", "linear_fc1"))
    }


@pytest.mark.slow
@pytest.mark.parametrize(("writes", "reads"), [("one", "tp2-sp"), ("tp2-sp", "one")])
def test_scales_go_with_their_rows(matrix, tmp_path, writes, reads):
    """In both halves of a gated layer: ModelOpt alone gives those of the gate to the other half."""
    cases = {"one": Case("one"), "tp2-sp": layout("qwen3", "tp2-sp")}
    still = ("--lr", "1e-30", "--weight-decay", "0")
    run = matrix.train(cases[writes], "INT8_WEIGHT_ONLY_CFG", tmp_path / "out", *still)
    argv = megatron_model.flags(str(matrix.folder / "qwen3"), str(run.folder), "--no-load-optim")
    argv += ["--export-quant-cfg", "INT8_WEIGHT_ONLY_CFG", *cases[reads].flags]
    for found in run_ranks(_rows_and_scales, cases[reads].world, argv):
        assert len(found) == 4
        assert all(torch.equal(rows, scales) for rows, scales in found.values())


@pytest.mark.slow
def test_a_teacher_of_full_precision_teaches_it(matrix, tmp_path):
    """On stages: scales and the losses told of them are those without a teacher; resumed bit for bit."""
    plain = matrix.train(Case("one"), "INT8_DEFAULT_CFG", tmp_path / "plain")
    case = layout("qwen3", "taught-pp2-mbs2")
    flags = ("--train-iters", "3", "--lr-decay-iters", "3")
    straight = matrix.train(case, "INT8_DEFAULT_CFG", tmp_path / "straight", *flags)
    stop = (*flags, "--exit-interval", "1")
    matrix.train(case, "INT8_DEFAULT_CFG", tmp_path / "out", *stop)
    again = matrix.train(case, "INT8_DEFAULT_CFG", tmp_path / "out", *flags)
    last = "checkpoints/iter_0000003"
    assert same_tensors(straight.folder / last, again.folder / last)
    scale, loss = matrix.differences(again, plain)
    assert scale < BOUND and loss < BOUND
    # What rounding does to the teacher's own weights is all that there is to learn.
    assert 0 < straight.steps[0]["kd_logits_loss"] < 0.1 < straight.steps[0]["lm_loss"]


def exported(run, target):
    """Export a run where one matrix has the scale of inputs a hundredth larger; why that is refused."""
    from model_provider import model_config
    from post_training.export import hf
    from post_training.export.quantised import stored_state
    from post_training.inference.load import load_model

    def wrong(*args):
        state, quantisation = stored_state(*args)
        state["model.layers.1.mlp.down_proj.input_scale"] *= 1.01
        return state, quantisation

    setattr(hf, "stored_state", wrong)  # noqa: B010
    loaded = load_model(model_config, output_dir=run)
    config, model = loaded.args.hf_config, loaded.args.hf_model
    try:
        hf.export_hf([loaded.model], config, loaded.tokenizer, target, hf_model=model)
    except SetupError as error:
        return str(error)


@pytest.mark.slow
def test_an_export_is_compared_whatever_a_last_bit_decides(matrix, tmp_path):
    """In bf16 inputs are rounded the other way here and there, which moves logits by a hundredth."""
    run = matrix.train(Case("one"), "INT8_DEFAULT_CFG", tmp_path / "out", "--bf16", "--save-hf")
    assert "reloaded with transformers, logits agree" in run.console
    refused = run_rank(exported, str(run.folder), str(tmp_path / "hf"))
    assert "logits differ from the run's by 9.90e-03" in refused
