"""That a resumed run draws what the uninterrupted one draws is in `tests/runs/test_resume.py`."""

import inspect
import os
import random
import sys

import pytest
import torch
from megatron.training import checkpointing, training

from post_training.checkpoint.saver import CheckpointSaver
from post_training.platform.checkpoints import random_states
from post_training.platform.checkpoints.loading import load_hooks
from tests.helpers import megatron_model
from tests.helpers.launch import run_ranks


def _states_after_loading(argv, patched):
    """Save and load on ranks whose states differ; which state each has afterwards."""
    args, (model, optimizer, scheduler) = megatron_model.set_up(argv)
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    random.seed(rank)
    expected = torch.rand(1).item(), random.random()
    torch.manual_seed(rank)
    random.seed(rank)
    os.makedirs(args.save, exist_ok=True)
    if patched:  # as a run that saves with a manifest
        CheckpointSaver(args, lambda: {"layout": random_states.layout_of(args)}, sys.stderr)
    args.iteration = 1
    checkpointing.save_checkpoint(1, model, optimizer, scheduler, 0)
    torch.manual_seed(99)
    random.seed(99)
    args.load, args.ckpt_step = args.save, 1
    if patched:
        load_hooks.layout = random_states.layout_of(args)
    checkpointing.load_checkpoint(model, optimizer, scheduler)
    return (torch.rand(1).item(), random.random()) == expected


def test_every_rank_gets_its_own_state_back(hf_model, tmp_path):
    argv = megatron_model.flags(str(hf_model("qwen3")), str(tmp_path / "out"))
    assert run_ranks(_states_after_loading, 2, argv, True) == [True, True]


@pytest.mark.slow
def test_still_needed_upstream_keeps_the_state_of_data_parallel_rank_0(hf_model, tmp_path):
    argv = megatron_model.flags(str(hf_model("qwen3")), str(tmp_path / "out"))
    assert run_ranks(_states_after_loading, 2, argv, False) == [True, False]


def test_what_is_patched():
    for function in (checkpointing.get_rng_state, checkpointing.load_checkpoint):
        assert inspect.unwrap(function) is not function
    assert training.load_checkpoint is checkpointing.load_checkpoint
