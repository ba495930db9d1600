import pytest

from post_training.arguments.parser import parse_arguments
from post_training.errors import SetupError


@pytest.fixture
def words(hf_model, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    folder = str(hf_model("qwen3"))
    return ["--hf-model", folder, "--output-dir", str(tmp_path / "out"), "--train-iters", "3"]


def test_the_model_describes_itself(words):
    args = parse_arguments(words)
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size) == (2, 64, 96)
    assert (args.num_attention_heads, args.num_query_groups, args.kv_channels) == (4, 2, 32)
    assert args.qk_layernorm and args.swiglu and not args.add_bias_linear
    assert (args.vocab_size, args.padded_vocab_size) == (391, 512)
    assert args.hf_config.model_type == "qwen3"


def test_finetuning_defaults(words):
    args = parse_arguments(words)
    assert args.hidden_dropout == args.attention_dropout == 0.0
    assert args.calculate_per_token_loss and args.use_distributed_optimizer
    assert args.micro_batch_size == args.global_batch_size == 1
    assert {"hidden_dropout", "num_layers", "transformer_impl"} <= set(args.derived)


def test_platform_flags_are_derived_not_asked_for(words):
    args = parse_arguments(words)
    assert args.transformer_impl == "local" and args.distributed_backend == "gloo"
    for fusion in (
        "gradient_accumulation_fusion",
        "masked_softmax_fusion",
        "bias_swiglu_fusion",
        "bias_dropout_fusion",
        "apply_rope_fusion",
    ):
        assert getattr(args, fusion) is False, fusion


def test_what_is_written_wins_over_what_is_derived(words):
    args = parse_arguments([*words, "--lr", "0.5", "--hidden-dropout", "0.25"])
    assert args.lr == 0.5 and args.hidden_dropout == 0.25
    assert "hidden_dropout" not in args.derived


def test_a_long_pack_is_no_reason_for_megatron_to_refuse(words):
    assert parse_arguments([*words, "--seq-length", "4096"]).max_position_embeddings >= 4096


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num-layers", "5"], ["--num-layers 5", "says 2"]),
        (["--hidden-size", "128"], ["--hidden-size 128", "says 64"]),
        (["--num-query-groups", "4"], ["--num-query-groups 4", "says 2"]),
        (["--train-samples", "10"], ["--train-samples", "--train-iters"]),
        (["--num-epochs", "2"], ["--train-iters", "--num-epochs"]),
        (
            ["--transformer-impl", "transformer_engine"],
            ["--transformer-impl", "Transformer Engine"],
        ),
        (["--fp32", "--bf16"], ["--fp32", "--bf16"]),
        (["--profile"], ["--profile", "--use-pytorch-profiler"]),
        (["--cross-entropy-loss-fusion"], ["--cross-entropy-loss-fusion", "--bf16"]),
        (["--cross-entropy-loss-fusion", "--fp16"], ["--cross-entropy-loss-fusion", "--bf16"]),
        # Megatron would average evaluations otherwise, or write what it cannot read again.
        (["--sft"], ["--sft is not supported", "averages evaluations otherwise"]),
        (["--ckpt-format", "torch"], ["--ckpt-format torch", "torch_dist"]),
        (
            ["--use-torch-fsdp2", "--expert-tensor-parallel-size", "2"],
            ["--expert-tensor-parallel-size 2", "FSDP2"],
        ),
        (["--tensor-model-parallel-size", "2"], ["1 processes", "tensor 2"]),
    ],
)
def test_contradictions_are_refused(words, flags, expected):
    with pytest.raises(SetupError) as caught:
        parse_arguments([*words, *flags])
    for text in expected:
        assert text in str(caught.value)


def test_a_loss_that_is_not_by_token_is_refused(words, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("calculate_per_token_loss: false\n")
    with pytest.raises(SetupError, match="calculate_per_token_loss"):
        parse_arguments([*words, "--config", str(file)])


def test_missing_flags_are_named(words):
    with pytest.raises(SetupError, match="--output-dir is missing"):
        parse_arguments([*words[:2], "--train-iters", "1"])
    with pytest.raises(SetupError, match="--hf-model is missing"):
        parse_arguments(["--output-dir", "x", "--train-iters", "1"])
    with pytest.raises(SetupError, match="--train-iters or --num-epochs"):
        parse_arguments(words[:-2])


def test_two_dashes_are_no_value(words):
    with pytest.raises(SetupError, match="--lr: expected one argument"):
        parse_arguments([*words, "--lr=--"])


def test_unknown_flag_is_refused(words):
    with pytest.raises(SetupError, match="--learning-rate: no such flag; use --lr"):
        parse_arguments([*words, "--learning-rate", "1"])
    with pytest.raises(SetupError, match="did you mean --train-iters"):
        parse_arguments([*words, "--train-itres", "1"])
