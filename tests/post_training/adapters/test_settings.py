"""Which matrices get factors, and what is refused before anything starts."""

import pytest

from post_training.adapters.identity import adapter_facts, check_adapter
from post_training.adapters.settings import chosen_targets, describe_adapter
from post_training.errors import SetupError
from post_training.layout.model_size import checkpoint_bytes

HF = "--model-backend transformers"


@pytest.fixture
def parse_for(hf_model, tmp_path, monkeypatch):
    from post_training.arguments.parser import parse_arguments

    def parse(family, *flags, world=1, **options):
        for name, value in (("RANK", "0"), ("WORLD_SIZE", str(world)), ("LOCAL_RANK", "0")):
            monkeypatch.setenv(name, value)
        words = ["--hf-model", str(hf_model(family, **options)), "--train-iters", "3"]
        return parse_arguments([*words, "--output-dir", str(tmp_path / "out"), *flags])

    return parse


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("all", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("attention", "q_proj k_proj v_proj o_proj"),
        ("mlp", "gate_proj up_proj down_proj"),
        ("attention lm_head", "q_proj k_proj v_proj o_proj lm_head"),
        ("self_attn.q_proj embed_tokens", "embed_tokens q_proj"),
        (r"model\.layers\.1\..*(up|down)_proj", "up_proj down_proj"),
    ],
)
def test_names_and_patterns(parse_for, words, expected):
    args = parse_for("qwen3", "--lora-rank", "4", "--lora-targets", *words.split())
    chosen = chosen_targets(args.hf_config, args.lora)
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in chosen))
    assert last == sorted(expected.split(), key=last.index)
    layers = {name.split(".")[2] for name in chosen if ".layers." in name}
    assert layers == ({"1"} if "layers" in words else {"0", "1"})


def test_what_is_trained_is_told_and_counted(parse_for):
    args = parse_for("qwen3", "--lora-rank", "4", "--lora-targets", "q_proj", "--rslora")
    told = describe_adapter(args) or ""
    trained = 2 * 4 * (64 + 128)
    assert f"{trained:,} of" in told and "q_proj [128, 64] x 2: rank 4, scaling 4" in told
    assert checkpoint_bytes(args) == 16 * trained


@pytest.mark.parametrize(
    ("family", "flags", "message"),
    [
        ("qwen3", "--lora-alpha 4", "there is no adapter"),
        ("qwen3", "--rslora", "there is no adapter"),
        ("qwen3", "--lora-rank 0", "at least 1"),
        ("qwen3", "--lora-rank 4 --lora-dropout 1", "below 1"),
        ("qwen3", "--lora-rank 65", "at most 64"),
        (
            "qwen3",
            "--lora-rank 4 --lora-targets wq",
            "wq: matches no matrix; there are embed_tokens",
        ),
        ("qwen3", "--lora-rank 4 --lora-targets q_proj x_proj", "x_proj: matches no matrix"),
        ("qwen3", "--lora-rank 4 --lora-targets .*q.*", "the norm model.layers.0.self_attn.q_norm"),
        ("qwen3", "--lora-rank 4 --lora-targets (", "is no pattern"),
        ("qwen3", "--lora-rank 4 --lora-targets q_proj .*", "one pattern alone"),
        ("qwen3_moe", "--lora-rank 4 --lora-targets gate", "the router model.layers.0.mlp.gate"),
        ("qwen3_moe", "--lora-rank 4 --lora-targets .*gate.*", "the router"),
        ("qwen3", "--lora-rank 4 --base-precision nf4", "add --model-backend transformers"),
        (
            "deepseek_v3",
            "--lora-rank 4 --moe-shared-expert-overlap",
            "names model.layers.1.mlp.shared_experts.gate_proj",
        ),
        ("qwen3", f"--base-precision nf4 {HF}", "there is no adapter"),
        ("qwen3", f"--lora-rank 65 {HF}", "at most 64"),
        (
            "qwen3",
            f"--lora-rank 4 {HF} --lora-targets wq",
            "matches no matrix; there are embed_tokens",
        ),
        ("qwen3", f"--lora-rank 4 {HF} --lora-targets .*q.*", "matches the norm"),
        ("qwen3", f"--lora-rank 4 {HF} --freeze vision", "no part that sees"),
        (
            "qwen3_moe",
            f"--lora-rank 4 {HF} --lora-targets gate",
            "the router model.layers.0.mlp.gate",
        ),
        ("qwen3_moe", f"--lora-rank 4 {HF} --lora-targets .*mlp.*", "the router"),
        ("qwen3_moe", f"--lora-rank 4 {HF} --lora-targets up_proj", "up_proj: matches no matrix"),
        ("qwen3_moe", f"--lora-rank 4 {HF} --lora-dropout 0.1", "whose input is not dropped"),
        (
            "qwen3_moe",
            f"--lora-rank 4 {HF} --base-precision nf4",
            "experts.gate_up_proj is no torch",
        ),
        ("gpt2", "--lora-rank 4 --lora-targets wte", "embedding and output layer in one"),
        (
            "mamba2",
            "--lora-rank 4 --lora-targets out_proj --model-backend transformers",
            "the layer backbone.layers.0.mixer.out_proj",
        ),
        ("gpt_oss", "--lora-rank 4", "all matches .*experts' matrices in one tensor"),
        ("gpt_oss", "--lora-rank 4 --lora-targets down_proj", "experts' matrices in one tensor"),
        ("phi3", "--lora-rank 4", "qkv_proj is one tensor of several .*transformers"),
        ("glm4", "--lora-rank 4 --lora-targets mlp", "gate_up_proj is one tensor of several"),
        ("granite", "--draft eagle3", "cannot stand beside a GraniteForCausalLM"),
        ("phi3", "--draft eagle3", "cannot stand beside a Phi3ForCausalLM"),
        ("qwen3", "--lora-rank 4 --draft eagle3", "not with --lora-rank"),
        ("qwen3", "--lora-rank 4 --random-weights", "no --random-weights"),
        ("qwen3", "--lora-rank 4 --bf16 --optimizer sgd", "beside a base in 16 bits"),
        ("qwen3", "--lora-rank 4 --export-kd-teacher-load T", "is trained as a whole"),
        ("qwen3", "--lora-rank 4 --decoupled-lr 1e-3", "at one rate"),
        ("qwen3", "--lora-rank 4 --lora-adapter nowhere", "--lora-adapter says it"),
        ("qwen3", "--lora-adapter nowhere", "holds no adapter_config.json"),
    ],
)
def test_refused(parse_for, family, flags, message):
    with pytest.raises(SetupError, match=message.replace("[", r"\[")):
        parse_for(family, *flags.split())


@pytest.mark.parametrize(
    ("family", "flags", "message"),
    [
        (
            "qwen3",
            r"--pipeline-model-parallel-size 2 --lora-targets .*\.1\..*_proj",
            "layer 0 has no factors",
        ),
        (
            "qwen3_moe",
            r"--expert-model-parallel-size 2 --lora-targets .*experts\.0\.down_proj",
            "some experts only",
        ),
        (
            "qwen3_moe",
            "--tensor-model-parallel-size 2 --lora-dropout 0.1",
            "use --expert-tensor-parallel-size 1",
        ),
    ],
)
def test_a_rank_without_factors_is_refused(parse_for, family, flags, message):
    with pytest.raises(SetupError, match=message):
        parse_for(family, "--lora-rank", "4", *flags.split(), world=2)


def test_tied_embeddings_get_no_factors(parse_for):
    with pytest.raises(SetupError, match="embedding and output layer in one"):
        parse_for("qwen3", "--lora-rank", "4", "--lora-targets", "embed_tokens", tied=True)


def test_a_checkpoint_holds_this_adapter_of_this_base(parse_for):
    mine = parse_for("qwen3", "--lora-rank", "4")
    facts = adapter_facts(mine)
    assert facts is not None
    check_adapter(mine, "C", facts)
    check_adapter(parse_for("qwen3"), "C", None)
    spelled = ("--lora-rank", "4", "--lora-alpha", "8", "--lora-targets", "attention", "mlp")
    check_adapter(parse_for("qwen3", *spelled), "C", facts)
    for other, written, message in (
        (parse_for("qwen3"), facts, "C holds an adapter only"),
        (mine, None, "C holds a whole model"),
        (parse_for("qwen3", "--lora-rank", "5"), facts, "its rank is 4.* are 5"),
        (parse_for("qwen3", "--lora-rank", "4", "--lora-alpha", "4"), facts, "alpha 8"),
        (mine, facts | {"base": "another"}, "other weights than those of --hf-model"),
        (mine, facts | {"nf4": True}, "of a base that was in 4 bits: give --base-precision nf4"),
    ):
        with pytest.raises(SetupError, match=message):
            check_adapter(other, "C", written)
