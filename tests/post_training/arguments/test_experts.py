import pytest

from post_training.arguments.parser import parse_arguments
from post_training.errors import SetupError
from tests.helpers.models import edit_json, save_model


@pytest.fixture
def words(hf_model, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    folder = str(hf_model("qwen3_moe"))
    return ["--hf-model", folder, "--output-dir", str(tmp_path / "out"), "--train-iters", "3"]


def test_no_balancing_unless_it_is_asked_for(words):
    args = parse_arguments(words)
    assert (args.moe_router_load_balancing_type, args.moe_aux_loss_coeff) == ("none", 0.0)
    assert args.moe_token_dispatcher_type == "alltoall"
    assert not args.moe_grouped_gemm


@pytest.mark.parametrize("more", [[], ["--moe-router-load-balancing-type", "seq_aux_loss"]])
def test_a_coefficient_turns_it_on(words, more):
    args = parse_arguments([*words, "--moe-aux-loss-coeff", "0.001", *more])
    # Megatron's own losses stay off: `DocumentRouter` computes it.
    assert (args.moe_router_load_balancing_type, args.moe_aux_loss_coeff) == ("none", 0.001)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--moe-router-load-balancing-type", "aux_loss"], "use seq_aux_loss"),
        (["--moe-router-load-balancing-type", "none", "seq_aux_loss"], "use seq_aux_loss"),
        (["--moe-router-load-balancing-type", "sinkhorn"], "use seq_aux_loss"),
        (["--moe-router-load-balancing-type", "seq_aux_loss"], "needs --moe-aux-loss-coeff"),
        (["--moe-aux-loss-coeff", "0.1", "0.2"], "give one coefficient"),
        (["--moe-aux-loss-coeff", "-1"], "at least 0"),
        (["--moe-z-loss-coeff", "0.1"], "--moe-z-loss-coeff 0.1 is not supported"),
        (
            ["--moe-expert-capacity-factor", "1.0"],
            "--moe-expert-capacity-factor 1.0 is not supported",
        ),
        (["--moe-router-enable-expert-bias"], "says False; leave the flag out"),
        (["--moe-grouped-gemm"], "needs --transformer-impl transformer_engine"),
        (
            [
                *("--recompute-granularity", "selective", "--recompute-modules", "moe"),
                *("--pipeline-model-parallel-size", "2"),
            ],
            "use --recompute-granularity full",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(words, flags, expected):
    with pytest.raises(SetupError, match=expected):
        parse_arguments([*words, *flags])


def test_a_model_without_experts_has_nothing_to_balance(words, hf_model):
    words[1] = str(hf_model("qwen3"))
    assert parse_arguments(words).moe_aux_loss_coeff == 0.0
    with pytest.raises(SetupError, match="no experts"):
        parse_arguments([*words, "--moe-aux-loss-coeff", "0.1"])


def test_a_model_that_asks_for_the_loss_needs_an_answer(words, tmp_path):
    folder = save_model(tmp_path / "model", "qwen3_moe")
    edit_json(folder / "config.json", output_router_logits=True)
    words[1] = str(folder)
    with pytest.raises(
        SetupError, match=r"router_aux_loss_coef 0.001\): give --moe-aux-loss-coeff"
    ):
        parse_arguments(words)
    assert parse_arguments([*words, "--moe-aux-loss-coeff", "0"]).moe_aux_loss_coeff == 0.0


def test_a_model_of_flags_chooses_among_its_experts(hf_model, tmp_path):
    """Of config.json this is checked with its other numbers."""
    words = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --vocab-size 391 --train-iters 1 "
        f"--max-position-embeddings 64 --hf-tokenizer {hf_model('qwen3')} --output-dir {tmp_path / 'o'}"
    ).split()
    with pytest.raises(SetupError, match="--moe-router-topk 5: the model has only 4 experts"):
        parse_arguments([*words, "--num-experts", "4", "--moe-router-topk", "5"])
