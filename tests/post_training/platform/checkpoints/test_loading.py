"""Without Transformer Engine: local layers take its names and its extra states for a while."""

import os
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from post_training.platform.checkpoints.loading import (
    CheckpointUnreadable,
    fit_to_checkpoint,
    keys_of,
)
from tests.helpers import megatron_model
from tests.helpers.launch import run_ranks

NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
TE_NORM = "decoder.layers.pre_mlp_layernorm.weight"


def tensor(key):
    return ShardedTensor.from_rank_offsets(key, torch.ones(2))


def test_what_a_checkpoint_names_otherwise_is_asked_for_in_its_words():
    moment = "optimizer.state.exp_avg."
    asked: dict[str, Any] = {
        "model": {"a": tensor(NORM), "b": tensor("lacking"), "c": tensor("there")},
        "optimizer": {0: [tensor(moment + NORM)]},
    }
    assert not fit_to_checkpoint(asked, {TE_NORM, "there", moment + TE_NORM})
    assert [each.key for each in asked["model"].values()] == [TE_NORM, "lacking", "there"]
    assert asked["optimizer"][0][0].key == moment + TE_NORM
    # Back again, and by its own name where it has both.
    assert not fit_to_checkpoint(asked, {NORM, moment + NORM, moment + TE_NORM})
    assert asked["model"]["a"].key == NORM
    assert asked["optimizer"][0][0].key == moment + TE_NORM


def test_an_extra_state_that_is_lacking_is_not_asked_for():
    def extra(key):
        return ShardedObject(key, "own " + key, (1,), (0,))

    asked: dict[str, Any] = {
        "model": {"x": extra("x._extra_state"), "y": extra("y._extra_state"), "z": extra("z")},
        "args": "not sharded",
    }
    kept = fit_to_checkpoint(asked, {"x._extra_state"})
    assert kept == [("model", "y", "own y._extra_state")]
    assert list(asked["model"]) == ["x", "z"], "what is no extra state is asked for"


def test_a_shard_of_an_object_is_known_by_the_objects_key():
    state = ShardedObject("rng_state/rank", None, (2,), (1,))
    listed = ShardedObject.empty_from_unique_key(state.unique_key)
    assert (listed.key, listed.global_shape, listed.global_offset) == ("rng_state/rank", (2,), (1,))
    assert keys_of([state.unique_key, "decoder.weight"]) == {"rng_state/rank", "decoder.weight"}


class ScaledNorm(torch.nn.RMSNorm):
    """A norm with an extra state, as Transformer Engine's has."""

    scale = 2.0

    def get_extra_state(self):
        return torch.tensor(self.scale)

    def set_extra_state(self, state):
        self.scale = float(state)


def _between_kinds_of_layers(folder, out):
    """Save as one kind of layers, load as the other; each time with what plain Megatron says to it."""
    from megatron.core import dist_checkpointing

    _, built = megatron_model.set_up(megatron_model.flags(folder, f"{out}/run", "--random-weights"))
    chunk = megatron_model.unwrapped(built)
    layers, final = chunk.decoder.layers, chunk.decoder.final_layernorm
    own_map = dict(layers[0].submodules_config.sharded_state_dict_keys_map)

    def become(kind):
        for layer in layers:
            keys = dict(own_map)
            if kind == "te":
                del keys["pre_mlp_layernorm."]
            layer.submodules_config.sharded_state_dict_keys_map = keys
        for norm in (final, *(layer.pre_mlp_layernorm for layer in layers)):
            norm.__class__ = ScaledNorm if kind == "te" else torch.nn.RMSNorm

    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.normal_()
    expected = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    answers = {}
    for saved, loaded in (("local", "te"), ("te", "local")):
        become(saved)
        checkpoint = f"{out}/{saved}"
        os.makedirs(checkpoint)
        dist_checkpointing.save({"model": chunk.sharded_state_dict()}, checkpoint)
        become(loaded)
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.zero_()
        try:
            dist_checkpointing.load.__wrapped__({"model": chunk.sharded_state_dict()}, checkpoint)
            upstream = "loads"
        except CheckpointUnreadable as error:
            upstream = str(error)
        state = dist_checkpointing.load({"model": chunk.sharded_state_dict()}, checkpoint)
        chunk.load_state_dict(state["model"], strict=True)
        equal = all(torch.equal(p, expected[name]) for name, p in chunk.named_parameters())
        answers[loaded] = (equal, upstream)
    return answers


@pytest.mark.slow
def test_either_kind_of_layers_loads_what_the_other_saved(hf_model, tmp_path):
    (answers,) = run_ranks(_between_kinds_of_layers, 1, str(hf_model("qwen3_moe")), str(tmp_path))
    for loaded, (equal, upstream) in answers.items():
        assert equal, loaded
        assert "not in state dict" in upstream or "Missing key" in upstream, upstream
