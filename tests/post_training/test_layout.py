from argparse import Namespace

import pytest

from post_training import layout
from post_training.errors import SetupError


def arguments(**changes):
    values = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": None,
        "world_size": 1,
        "num_attention_heads": 12,
        "num_query_groups": 4,
        "ffn_hidden_size": 96,
        "num_layers": 6,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "pipeline_model_parallel_layout": None,
        "num_experts": None,
        "micro_batch_size": 1,
        "global_batch_size": None,
        "eval_global_batch_size": None,
        "eval_micro_batch_size": None,
        "sequence_parallel": False,
        "hybrid_context_parallel": False,
        "hierarchical_context_parallel_sizes": None,
        "cp_comm_type": ["all_gather"],
        "seq_length": 128,
        "transformer_impl": "local",
        "make_vocab_size_divisible_by": 128,
    }
    assert changes.keys() <= values.keys()
    return Namespace(**(values | changes))


GOOD = [
    {},
    {"tensor_model_parallel_size": 4, "world_size": 8},
    {"pipeline_model_parallel_size": 3, "world_size": 3},
    {"pipeline_model_parallel_size": 4, "world_size": 4, "decoder_first_pipeline_num_layers": 3},
    {"world_size": 2, "global_batch_size": 8, "micro_batch_size": 4},
    {"expert_model_parallel_size": 2, "num_experts": 4, "world_size": 2},
    {"context_parallel_size": 2, "world_size": 4, "seq_length": 132},
]


@pytest.mark.parametrize("changes", GOOD)
def test_layouts_that_work(changes):
    layout.check(arguments(**changes))


# What is refused, what the message must hold, and changes after which it is accepted: the message's advice.
BAD: list[tuple[dict[str, object], list[str], dict[str, object]]] = [
    (
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3, "world_size": 8},
        ["8 processes", "tensor 2", "pipeline 3", "multiple of 6"],
        {"world_size": 12},
    ),
    (
        {"tensor_model_parallel_size": 3, "world_size": 3},
        ["--tensor-model-parallel-size 3", "4 key/value heads", "1, 2, 4"],
        {"tensor_model_parallel_size": 4, "world_size": 4},
    ),
    (
        {"tensor_model_parallel_size": 8, "world_size": 8},
        ["--tensor-model-parallel-size 8", "12 attention heads", "1, 2, 4"],
        {"tensor_model_parallel_size": 2},
    ),
    (
        {"pipeline_model_parallel_size": 4, "world_size": 4},
        ["--pipeline-model-parallel-size 4", "6 layers", "1, 2, 3, 6"],
        {"pipeline_model_parallel_size": 2},
    ),
    (
        {"expert_model_parallel_size": 2, "world_size": 2},
        ["--expert-model-parallel-size 2", "no experts"],
        {"expert_model_parallel_size": 1},
    ),
    (
        {"expert_model_parallel_size": 3, "num_experts": 4, "world_size": 3},
        ["--expert-model-parallel-size 3", "4 experts", "1, 2, 4"],
        {"expert_model_parallel_size": 4, "world_size": 4},
    ),
    (
        {"global_batch_size": 10, "micro_batch_size": 2, "world_size": 2},
        ["--global-batch-size 10", "--micro-batch-size 2", "2 data parallel", "is 8"],
        {"global_batch_size": 8},
    ),
    (
        {"global_batch_size": 8, "eval_global_batch_size": 3, "world_size": 2},
        ["--eval-global-batch-size 3", "2 data parallel", "is 4"],
        {"eval_global_batch_size": 4},
    ),
    ({"micro_batch_size": 0}, ["--micro-batch-size 0", "at least 1"], {"micro_batch_size": 1}),
    (
        {
            "tensor_model_parallel_size": 4,
            "world_size": 4,
            "sequence_parallel": True,
            "seq_length": 130,
        },
        ["--sequence-parallel", "--seq-length 130", "use 132"],
        {"seq_length": 132},
    ),
    (
        {"context_parallel_size": 4, "world_size": 4, "seq_length": 132},
        ["--seq-length 132", "--context-parallel-size 4", "use 136"],
        {"seq_length": 136},
    ),
    (
        {
            "context_parallel_size": 2,
            "tensor_model_parallel_size": 4,
            "world_size": 8,
            "sequence_parallel": True,
            "seq_length": 132,
        },
        ["--seq-length 132", "--context-parallel-size 2 and --sequence-parallel", "use 136"],
        {"seq_length": 136},
    ),
    (
        {"context_parallel_size": 2, "world_size": 2, "cp_comm_type": ["p2p"]},
        ["--cp-comm-type", "p2p", "all_gather"],
        {"cp_comm_type": ["all_gather"]},
    ),
    (
        {"context_parallel_size": 2, "world_size": 2, "hybrid_context_parallel": True},
        ["--hybrid-context-parallel"],
        {"hybrid_context_parallel": False},
    ),
    (
        {"tensor_model_parallel_size": 4, "world_size": 4, "ffn_hidden_size": 90},
        ["--tensor-model-parallel-size 4", "feed-forward size 90"],
        {"ffn_hidden_size": 92},
    ),
]


@pytest.mark.parametrize(("changes", "expected", "advice"), BAD)
def test_what_cannot_work_is_refused_with_what_would(changes, expected, advice):
    with pytest.raises(SetupError) as caught:
        layout.check(arguments(**changes))
    for text in expected:
        assert text in str(caught.value)
    layout.check(arguments(**(changes | advice)))


@pytest.mark.parametrize(
    ("size", "tp", "expected"), [(391, 1, 512), (391, 2, 512), (512, 4, 512), (391, 3, 768)]
)
def test_padded_vocabulary(size, tp, expected):
    found = layout.padded_vocabulary(size, arguments(tensor_model_parallel_size=tp))
    assert found == expected and found % tp == 0


def test_global_batch_defaults_to_one_micro_batch_a_rank():
    args = arguments(world_size=4, micro_batch_size=2, tensor_model_parallel_size=2)
    layout.check(args)
    assert args.global_batch_size == 4
