import copy
from argparse import Namespace

import pytest
import torch

from post_training import modelopt_state
from tests.helpers import megatron_model
from tests.helpers.launch import run_rank

IDS = torch.arange(40)


def test_modelopt_is_asked_only_where_its_state_was_saved(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    args = Namespace(load=str(tmp_path), modelopt_enabled=None)
    modelopt_state.maybe_enable_modelopt(args)
    assert args.modelopt_enabled is False
    (tmp_path / "iter_0000007" / "modelopt_state").mkdir(parents=True)
    modelopt_state.maybe_enable_modelopt(args)
    assert args.modelopt_enabled is True


def _facts(model):
    with torch.no_grad():
        logits = model(IDS.unsqueeze(0), torch.arange(len(IDS)).unsqueeze(0), None)[0]
    scales = {n: b.clone() for n, b in model.named_buffers() if n.endswith("_amax")}
    return logits, scales


def _quantise_and_save(argv):
    import modelopt.torch.quantization as mtq
    from megatron.training.checkpointing import save_checkpoint

    args, built = megatron_model.set_up(argv)
    model = megatron_model.unwrapped(built).eval()
    plain, _ = _facts(model)
    mtq.quantize(model, copy.deepcopy(mtq.INT8_DEFAULT_CFG), _facts)
    args.no_save_optim = True
    save_checkpoint(1, built[0], None, None, 0)
    return plain, _facts(model)


def _restore(argv):
    _, built = megatron_model.set_up(argv)
    # Quantisers measure the weights that the model has when its state is restored.
    return _facts(megatron_model.unwrapped(built).eval())


@pytest.mark.slow
def test_modelopt_state_survives_save_and_load(hf_model, tmp_path):
    folder, out = str(hf_model("qwen3")), str(tmp_path / "out")
    plain, (logits, scales) = run_rank(_quantise_and_save, megatron_model.flags(folder, out))
    assert (tmp_path / "out/checkpoints/iter_0000001/modelopt_state").is_dir()
    assert len(scales) == 16 and not torch.equal(plain, logits), "it was quantised"
    argv = megatron_model.flags(folder, out, "--no-load-optim")
    found, found_scales = run_rank(_restore, argv)
    assert torch.equal(found, logits)
    assert found_scales.keys() == scales.keys()
    assert all(torch.equal(found_scales[name], scales[name]) for name in scales)
