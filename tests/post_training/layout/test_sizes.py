import random
import re
from argparse import Namespace

import pytest

from post_training.errors import SetupError
from post_training.layout import sizes


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
        "group_query_attention": True,
        "multi_latent_attention": False,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_pos_emb_head_dim": 6,
        "num_query_groups": 4,
        "ffn_hidden_size": 96,
        "num_layers": 6,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "pipeline_model_parallel_layout": None,
        "num_experts": None,
        "hybrid_layer_pattern": None,
        "add_bias_linear": False,
        "moe_ffn_hidden_size": None,
        "moe_shared_expert_intermediate_size": None,
        "moe_layer_freq": 1,
        "microbatch_group_size_per_vp_stage": None,
        "overlap_p2p_comm": True,
        "cp_comm_type": ["all_gather"],
        "micro_batch_size": 1,
        "global_batch_size": None,
        "eval_global_batch_size": None,
        "eval_micro_batch_size": None,
        "sequence_parallel": False,
        "seq_length": 128,
        "transformer_impl": "local",
        "make_vocab_size_divisible_by": 128,
        "use_torch_fsdp2": False,
        "fsdp_sharding": "full",
        "use_distributed_optimizer": False,
        "fp16": False,
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
        "ckpt_format": "torch_dcp",
        "skip_train": False,
        "output_dir": None,
        "save": None,
    }
    assert changes.keys() <= values.keys()
    return Namespace(**(values | changes))


GOOD = [
    {},
    {
        "tensor_model_parallel_size": 4,
        "world_size": 4,
        "group_query_attention": False,
        "num_query_groups": 1,
    },
    {"tensor_model_parallel_size": 4, "world_size": 8},
    {"pipeline_model_parallel_size": 3, "world_size": 3},
    {"pipeline_model_parallel_size": 4, "world_size": 4, "decoder_first_pipeline_num_layers": 3},
    {"world_size": 2, "global_batch_size": 8, "micro_batch_size": 4},
    {"expert_model_parallel_size": 2, "num_experts": 4, "world_size": 2},
    {"context_parallel_size": 2, "world_size": 4, "seq_length": 132},
    # Every layer has experts: the dense feed-forward size cuts nothing.
    {
        "tensor_model_parallel_size": 4,
        "sequence_parallel": True,
        "world_size": 4,
        "num_experts": 4,
        "ffn_hidden_size": 90,
        "moe_ffn_hidden_size": 64,
    },
    {
        "pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": 1,
        "world_size": 4,
        "global_batch_size": 8,
    },
    {
        "pipeline_model_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": 2,
        "num_layers": 10,
        "decoder_first_pipeline_num_layers": 4,
        "world_size": 2,
    },
]


@pytest.mark.parametrize("changes", GOOD)
def test_layouts_that_work(changes):
    sizes.check(arguments(**changes))


PP2 = {"pipeline_model_parallel_size": 2, "world_size": 2}
TP2_EXPERTS = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "num_experts": 4,
    "world_size": 2,
}
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
        {"tensor_model_parallel_size": 4, "world_size": 4, "multi_latent_attention": True},
        ["latent vector of keys and values has 22 elements", "1, 2, 11, 22"],
        {"tensor_model_parallel_size": 2, "world_size": 4, "multi_latent_attention": True},
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
        [
            "--global-batch-size 10",
            "--micro-batch-size 2",
            "2 data parallel",
            "= 4; nearest that works on",
        ],
        {"global_batch_size": 8},
    ),
    (
        {"global_batch_size": 8, "eval_global_batch_size": 3, "world_size": 2},
        ["--eval-global-batch-size 3", "2 data parallel", "= 2; nearest that works on"],
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
    # What does nothing in this layout is not taken without a word either.
    (
        {"cp_comm_type": ["junk"]},
        ["--cp-comm-type", "junk", "leave the flag out"],
        {"cp_comm_type": ["all_gather"]},
    ),
    (
        {**PP2, "microbatch_group_size_per_vp_stage": 4},
        [
            "virtual-pipeline-stage 4: there are no virtual stages",
            "2, without --microbatch-group-size",
        ],
        {"microbatch_group_size_per_vp_stage": None},
    ),
    (
        {**PP2, "pipeline_model_parallel_layout": "Et|tL"},
        ["--pipeline-model-parallel-layout Et|tL: has 2 layers (t), the model has 6"],
        {"pipeline_model_parallel_layout": "Ettt|tttL"},
    ),
    (
        {**PP2, "pipeline_model_parallel_layout": "ttt|EtttL"},
        ["--pipeline-model-parallel-layout ttt|EtttL: The first layer must be embedding"],
        {"pipeline_model_parallel_layout": "Ettt|tttL"},
    ),
    (
        {**PP2, "pipeline_model_parallel_layout": "foo|L"},
        ["--pipeline-model-parallel-layout foo|L: Invalid layer character"],
        {"pipeline_model_parallel_layout": "Etttttt|L"},
    ),
    (
        {"expert_tensor_parallel_size": 2, "world_size": 2},
        ["--expert-tensor-parallel-size 2: the model has no experts"],
        {"expert_tensor_parallel_size": 1},
    ),
    (
        {"tensor_model_parallel_size": 4, "world_size": 4, "ffn_hidden_size": 90},
        ["--tensor-model-parallel-size 4", "feed-forward size 90"],
        {"ffn_hidden_size": 92},
    ),
    (
        {**PP2, "num_virtual_stages_per_pipeline_rank": 2},
        ["--num-virtual-stages-per-pipeline-rank 2", "3 layers", "work: 1, 3"],
        {"num_virtual_stages_per_pipeline_rank": 3},
    ),
    (
        {**PP2, "num_layers_per_virtual_pipeline_stage": 2},
        ["--num-layers-per-virtual-pipeline-stage 2", "3 layers", "work: 1, 3"],
        {"num_layers_per_virtual_pipeline_stage": 1},
    ),
    (
        {"num_virtual_stages_per_pipeline_rank": 2},
        ["--num-virtual-stages-per-pipeline-rank 2", "2 pipeline ranks or more"],
        {"pipeline_model_parallel_size": 3, "world_size": 3},
    ),
    (
        {**PP2, "num_virtual_stages_per_pipeline_rank": 3, "overlap_p2p_comm": False},
        ["3 pipeline ranks or more"],
        {"overlap_p2p_comm": True},
    ),
    (
        {
            **PP2,
            "num_virtual_stages_per_pipeline_rank": 3,
            "num_layers_per_virtual_pipeline_stage": 1,
        },
        ["give one of them"],
        {"num_layers_per_virtual_pipeline_stage": None},
    ),
    (
        {**PP2, "num_virtual_stages_per_pipeline_rank": 3, "global_batch_size": 3},
        ["--global-batch-size 3", "3 micro batches", "groups of 2; nearest that works on"],
        {"global_batch_size": 4},
    ),
    (
        {
            **PP2,
            "num_virtual_stages_per_pipeline_rank": 3,
            "global_batch_size": 4,
            "eval_global_batch_size": 1,
        },
        ["--eval-global-batch-size 1", "; nearest that works on"],
        {"eval_global_batch_size": 2},
    ),
    (
        {
            **PP2,
            "num_virtual_stages_per_pipeline_rank": 3,
            "microbatch_group_size_per_vp_stage": 1,
        },
        ["--microbatch-group-size-per-virtual-pipeline-stage 1", "at least"],
        {"microbatch_group_size_per_vp_stage": 2},
    ),
    (
        {**PP2, "decoder_first_pipeline_num_layers": 6},
        ["--decoder-first-pipeline-num-layers 6", "0 of the model's 6 layers", "1 other"],
        {"decoder_first_pipeline_num_layers": 2},
    ),
    (
        {**PP2, "pipeline_model_parallel_layout": "Et|tt|tttL"},
        ["--pipeline-model-parallel-layout", "3 stages"],
        {"pipeline_model_parallel_size": 3, "world_size": 3},
    ),
    (
        {**TP2_EXPERTS, "moe_ffn_hidden_size": 47},
        ["--expert-tensor-parallel-size 2", "feed-forward size 47"],
        {"expert_tensor_parallel_size": 1},
    ),
    (
        {**TP2_EXPERTS, "sequence_parallel": False},
        ["--sequence-parallel"],
        {"sequence_parallel": True},
    ),
    (
        {**TP2_EXPERTS, "expert_model_parallel_size": 4},
        ["2 processes", "expert tensor 2 x expert 4"],
        {"world_size": 8},
    ),
    (
        {"pipeline_model_parallel_size": 0},
        ["must be at least 1"],
        {"pipeline_model_parallel_size": 1},
    ),
]


@pytest.mark.parametrize(("changes", "expected", "advice"), BAD)
def test_what_cannot_work_is_refused_with_what_would(changes, expected, advice):
    with pytest.raises(SetupError) as caught:
        sizes.check(arguments(**changes))
    for text in expected:
        assert text in str(caught.value)
    assert str(caught.value).count("nearest") <= 1, "one proposal"
    sizes.check(arguments(**(changes | advice)))
    apply_proposal(arguments(**changes), str(caught.value))


def apply_proposal(args, message):
    """Check that the layout at the end of a message is accepted; returns the changed arguments."""
    found = re.fullmatch(
        r".*; nearest that works on (\d+) process(?:es)?: ([^,]+)(?:, without (.*))?", message
    )
    if found is None:
        assert "nearest that works" not in message
        return None
    assert int(found[1]) == args.world_size
    words = found[2].split() if found[2] != "no parallel flags" else []
    names = {
        "microbatch_group_size_per_virtual_pipeline_stage": "microbatch_group_size_per_vp_stage"
    }
    for flag, value in zip(words[::2], words[1::2], strict=True):
        setattr(args, flag.removeprefix("--").replace("-", "_"), int(value))
    for flag in (found[3] or "").split(" and ") if found[3] else []:
        name = flag.removeprefix("--").replace("-", "_")
        setattr(args, names.get(name, name), None)
    if args.num_experts and args.tensor_model_parallel_size > 1:
        args.sequence_parallel = True  # as `parse_arguments` does
    sizes.check(args)
    return args


@pytest.mark.parametrize(
    ("changes", "proposal"),
    [
        (
            {
                "tensor_model_parallel_size": 3,
                "pipeline_model_parallel_size": 2,
                "world_size": 6,
            },
            "6 processes: --tensor-model-parallel-size 2 --pipeline-model-parallel-size 3",
        ),
        ({"tensor_model_parallel_size": 3, "world_size": 4}, "--tensor-model-parallel-size 4"),
        # A rounded batch is nearer than another layout,
        ({"world_size": 4, "global_batch_size": 10}, "4 processes: --global-batch-size 8"),
        # and it costs less than a pipeline that nobody asked for.
        (
            {"tensor_model_parallel_size": 8, "world_size": 8, "global_batch_size": 1},
            "8 processes: --tensor-model-parallel-size 4 --global-batch-size 2",
        ),
        (
            {
                **PP2,
                "num_layers": 5,
                "world_size": 4,
                "global_batch_size": 4,
                "num_virtual_stages_per_pipeline_rank": 2,
            },
            "4 processes: --pipeline-model-parallel-size 1, without --num-virtual-stages",
        ),
        (
            {"expert_model_parallel_size": 4, "num_experts": 6, "world_size": 4},
            "--expert-model-parallel-size 2",
        ),
        (
            {"context_parallel_size": 3, "world_size": 4, "seq_length": 132},
            "4 processes: --context-parallel-size 2",
        ),
    ],
)
def test_the_nearest_layout(changes, proposal):
    with pytest.raises(SetupError) as caught:
        sizes.check(arguments(**changes))
    assert proposal in str(caught.value)
    assert apply_proposal(arguments(**changes), str(caught.value)) is not None


def test_every_proposal_works():
    """Layouts at random: what is proposed passes, and only where even one process could not is nothing."""
    random.seed(3)

    def some(*values):
        return random.choice(values)

    refused = 0
    for _ in range(400):
        changes = {
            "world_size": some(1, 2, 3, 4, 6, 8, 12, 16, 64),
            "tensor_model_parallel_size": some(1, 1, 2, 3, 4, 8),
            "pipeline_model_parallel_size": some(1, 1, 2, 3, 4),
            "context_parallel_size": some(1, 1, 1, 2, 3),
            "expert_model_parallel_size": some(1, 1, 2, 3, 4),
            "expert_tensor_parallel_size": some(None, None, 1, 2),
            "num_experts": some(None, 4, 6),
            "moe_ffn_hidden_size": some(48, 50),
            "num_layers": some(2, 5, 6, 8),
            "num_attention_heads": some(6, 12),
            "num_query_groups": some(2, 3),
            "num_virtual_stages_per_pipeline_rank": some(None, None, 2, 3),
            "num_layers_per_virtual_pipeline_stage": some(None, None, None, 1, 2),
            "decoder_first_pipeline_num_layers": some(None, None, 1, 2),
            "microbatch_group_size_per_vp_stage": some(None, None, None, 2, 5),
            "micro_batch_size": some(1, 2, 3),
            "global_batch_size": some(None, 1, 4, 7, 24),
            "eval_global_batch_size": some(None, None, 5, 8),
            "eval_micro_batch_size": some(None, None, 2),
            "seq_length": some(128, 130),
            "sequence_parallel": some(False, True),
        }
        try:
            sizes.check(arguments(**changes))
        except SetupError as error:
            refused += 1
            assert apply_proposal(arguments(**changes), str(error)) is not None, (
                changes,
                str(error),
            )
    assert refused > 200


@pytest.mark.parametrize(
    ("size", "tp", "expected"), [(391, 1, 512), (391, 2, 512), (512, 4, 512), (391, 3, 768)]
)
def test_padded_vocabulary(size, tp, expected):
    found = sizes.padded_vocabulary(size, arguments(tensor_model_parallel_size=tp))
    assert found == expected and found % tp == 0


def test_one_micro_batch_a_rank_is_a_global_batch():
    args = arguments(world_size=4, micro_batch_size=2, tensor_model_parallel_size=2)
    assert sizes.batch_multiple(args) == 4


def test_what_is_proposed_a_resume_takes(tmp_path):
    """A run that has begun goes on with its batch and packs only: another layout must do with them."""
    asked = arguments(world_size=4, pipeline_model_parallel_size=2, global_batch_size=3)
    with pytest.raises(
        SetupError, match=r"nearest that works on 4 processes: .*--global-batch-size"
    ):
        sizes.check(asked)
    begun = Namespace(**(vars(asked) | {"output_dir": str(tmp_path), "save": str(tmp_path)}))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    (tmp_path / "config.yaml").write_text(
        "derived_flags: []\nglobal_batch_size: 3\nseq_length: 128\n"
    )
    with pytest.raises(SetupError) as caught:
        sizes.check(begun)
    proposal = str(caught.value).partition("nearest that works on 4 processes:")[2]
    assert proposal and "--global-batch-size" not in proposal
    # What the run has and the command does not say is part of the proposal.
    begun.global_batch_size, begun.world_size, begun.context_parallel_size = None, 3, 2
    with pytest.raises(SetupError, match=r"nearest that works on 3 processes: .*batch-size 3"):
        sizes.check(begun)
