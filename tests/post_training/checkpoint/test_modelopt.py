"""A model that ModelOpt converted, and checkpoints from before and after: each gives back its own."""

import copy
import shutil

import pytest
import torch

from post_training.checkpoint import store
from tests.helpers import megatron_model
from tests.helpers.launch import run_rank

IDS = torch.arange(40)


def _facts(model):
    with torch.no_grad():
        logits = model(IDS.unsqueeze(0), torch.arange(len(IDS)).unsqueeze(0), None)[0]
    scales = {n: b.clone() for n, b in model.named_buffers() if n.endswith("_amax")}
    return logits, scales


def _quantise_and_save(argv):
    import modelopt.torch.quantization as mtq

    args, built = megatron_model.set_up(argv)
    model = megatron_model.unwrapped(built).eval()
    plain, _ = _facts(model)
    megatron_model.save_weights(args, built[0], 1)
    mtq.quantize(model, copy.deepcopy(mtq.INT8_DEFAULT_CFG), _facts)
    megatron_model.save_weights(args, built[0], 2)
    return plain, _facts(model)


def _restore(argv):
    args, built = megatron_model.set_up(argv)
    # Quantisers measure the weights that the model has when its state is restored.
    return args.modelopt_enabled, *_facts(megatron_model.unwrapped(built).eval())


def _save_config(argv):
    from post_training.arguments.parser import parse_arguments
    from post_training.hf.tokenizer import load_tokenizer
    from post_training.job import output

    args = parse_arguments(argv)
    output.save_config(args)
    output.save_model_folder(args, load_tokenizer(args))


def _restore_by_tools(output_dir, iteration):
    from model_provider import model_config
    from post_training.inference.load import load_model

    return _facts(load_model(model_config, output_dir=output_dir, iteration=iteration).model)


@pytest.mark.slow
def test_each_checkpoint_gives_back_its_own_kind_of_model(hf_model, tmp_path):
    """The one before the conversion, by name, and the newest; and with the kinds exchanged."""
    folder, out = str(hf_model("qwen3")), tmp_path / "out"
    argv = megatron_model.flags(folder, str(out), "--no-load-optim")
    plain, (logits, scales) = run_rank(_quantise_and_save, argv)
    saved = out / "checkpoints"
    assert (saved / "iter_0000002/modelopt_state").is_dir()
    assert len(scales) == 16 and not torch.equal(plain, logits), "it was quantised"

    def check(converted, by_name, found):
        enabled, found, found_scales = found
        assert enabled == converted
        assert torch.equal(found, logits if converted else plain), by_name
        assert found_scales.keys() == (scales.keys() if converted else set())
        assert all(torch.equal(found_scales[name], scales[name]) for name in found_scales)

    check(True, "newest", run_rank(_restore, argv))
    check(False, "older", run_rank(_restore, [*argv, "--ckpt-step", "1"]))
    shutil.copytree(saved / "iter_0000001", saved / "iter_0000003")
    store.point_at(saved, 3)
    check(True, "older", run_rank(_restore, [*argv, "--ckpt-step", "2"]))
    run_rank(_save_config, argv)
    for iteration, converted in ((1, False), (2, True), (3, False)):
        found = run_rank(_restore_by_tools, str(out), iteration)
        check(converted, iteration, (converted, *found))
