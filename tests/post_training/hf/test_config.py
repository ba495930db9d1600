import json
import shutil

import pytest
import torch

from post_training.arguments.parser import parse_arguments
from post_training.errors import SetupError
from post_training.hf.config import (
    check_architecture,
    check_version,
    load_hf_config,
    megatron_flags,
    sliding_window,
)
from post_training.hf.families import FAMILIES as ENTRIES
from post_training.hf.rotary import RotaryScaling
from tests.helpers.models import FAMILIES, edit_json, make_config


def config_of(family, **options):
    config = make_config(family, **options)
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    return config


def test_flags_of_state_space_layers():
    flags = megatron_flags(config_of("nemotron_h"))
    assert flags["hybrid_layer_pattern"] == "M-*E" and flags["num_layers"] == 4
    sizes = ("num_heads", "head_dim", "num_groups", "state_dim")
    assert [flags[f"mamba_{size}"] for size in sizes] == [8, 16, 2, 16]
    assert [flags[name] for name in ("num_query_groups", "num_experts")] == [2, 4]
    alone = megatron_flags(config_of("mamba2"))
    assert alone["hybrid_layer_pattern"] == "MM" and "num_experts" not in alone


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"mamba2", "nemotron_h"}))
def test_flags_of_a_family(family):
    config = config_of(family, tied=True)
    check_architecture(config, "x")
    flags = megatron_flags(config)
    assert flags["num_layers"] == 2 and flags["hidden_size"] == 64
    assert flags["vocab_size"] == config.vocab_size
    assert flags["num_query_groups"] == (4 if family == "deepseek_v3" else 2)
    assert flags["untie_embeddings_and_output_weights"] is False
    assert flags["add_qkv_bias"] is (family in ("glm4", "qwen2", "seed_oss"))
    assert flags["qk_layernorm"] is (family in ("deepseek_v3", "qwen3", "qwen3_moe"))
    turned = {"glm4": 0.5, "phi3": 0.75}
    assert flags.get("rotary_percent") == turned.get(family)
    head_dims = {"deepseek_v3": 8, "glm4": 24, "mistral": 24, "qwen3": 32, "seed_oss": 32}
    assert flags["kv_channels"] == head_dims.get(family, 16)
    experts = {"deepseek_v3": (8, 48), "gpt_oss": (4, 96), "mixtral": (4, 96), "qwen3_moe": (4, 48)}
    found = (flags.get("num_experts"), flags.get("moe_ffn_hidden_size"))
    assert found == experts.get(family, (None, None))
    assert flags.get("no_rope_freq") == ([0, 1] if family == "smollm3" else None)


@pytest.mark.parametrize(
    ("family", "stray"),
    [
        ("mistral", {"use_sliding_window": False}),
        ("phi3", {"use_sliding_window": False, "layer_types": ["full_attention"] * 2}),
        ("gpt_oss", {"use_sliding_window": False, "norm_topk_prob": False, "mlp_only_layers": [0]}),
        ("mixtral", {"norm_topk_prob": False, "decoder_sparse_step": 2, "n_group": 3}),
        ("qwen3_moe", {"first_k_dense_replace": 1, "layer_types": ["full_attention"] * 2}),
    ],
)
def test_keys_of_other_families_are_passed_over(hf_model, tmp_path, family, stray):
    """As by transformers: each of these gave another model than its class computes."""
    options = {} if family in ("mixtral", "qwen3_moe") else {"sliding_window": 8}
    shutil.copy(hf_model(family, **options) / "config.json", tmp_path)
    expected = megatron_flags(load_hf_config(str(tmp_path)))
    edit_json(tmp_path / "config.json", **stray)
    assert megatron_flags(load_hf_config(str(tmp_path))) == expected


def test_one_expert_whose_weight_is_a_probability():
    config = config_of("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=False)
    check_architecture(config, "x")
    assert megatron_flags(config)["moe_router_pre_softmax"] is True


def test_heads_of_no_attention_layer_count_for_nothing():
    kinds = ["linear_attention", "mlp"]
    flags = megatron_flags(config_of("nemotron_h", layers_block_type=kinds, num_attention_heads=3))
    assert flags["num_attention_heads"] == flags["mamba_num_heads"] == 8


def test_expert_flags():
    flags = megatron_flags(
        config_of("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0], decoder_sparse_step=1)
    )
    assert flags["num_experts"] == 4 and flags["moe_router_topk"] == 2
    assert flags["moe_layer_freq"] == [0, 1, 1, 1]
    assert flags["moe_router_pre_softmax"] is False


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 256,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies_are_those_of_transformers(rope):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = config_of("llama", rope_parameters=rope)
    check_architecture(config, "x")
    found, theirs = RotaryScaling.of(config), LlamaRotaryEmbedding(config)
    assert torch.equal(found.inv_freq, theirs.inv_freq)
    assert found.attention_factor == theirs.attention_scaling
    assert found.inv_freq.shape == (8,)
    if found.original_length is not None:
        lengths = torch.tensor([found.original_length + more for more in (-1, 0, 1, 300)])
        for length, frequencies in zip(lengths, found.frequencies(lengths), strict=True):
            theirs = LlamaRotaryEmbedding(config)
            theirs(torch.zeros(1), torch.arange(length).unsqueeze(0))
            torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act gelu .*only silu and swish"),
        ("seed_oss", {"attention_bias": False}, "attention_bias False .*SeedOss.*only True"),
        ("seed_oss", {"attention_out_bias": True}, "attention_out_bias True"),
        ("granite", {"attention_multiplier": 0.0}, "attention_multiplier 0.0, expected"),
        (
            "gpt_oss",
            {"sliding_window": None},
            "sliding_window None, expected the window of its layer",
        ),
        ("gpt_oss", {"num_experts_per_tok": 1}, "num_experts_per_tok 1 is not .*add up to 1"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok 1 is not .*add up to 1"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}},
            "proportional.*default, linear, llama3",
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 3,
                }
            },
            "longrope needs 8 numbers as long_factor.*has 3",
        ),
        *(
            (
                family,
                {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": share}},
                f"partial.*{said}",
            )
            for family, share, said in (
                ("llama", 0.5, "not supported"),
                ("glm4", 0.125, "0.125, expected .*even part of the head's size 24"),
                ("phi3", 1.5, "1.5, expected"),
                ("phi3", 0, "0, expected"),
            )
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "x"}},
            "factor of its rotary embedding .x., expected",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused(family, options, message):
    with pytest.raises(SetupError, match=message):
        check_architecture(config_of(family, **options), "some/model")


def test_unsupported_architecture_lists_those_that_can_be_loaded():
    config = config_of("llama")
    config.architectures = ["MambaForCausalLM"]
    with pytest.raises(SetupError, match="MambaForCausalLM") as caught:
        check_architecture(config, "some/model")
    assert all(name in str(caught.value) for name in ENTRIES)
    config.architectures = None
    with pytest.raises(SetupError, match="none named"):
        check_architecture(config, "some/model")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "qwen3",
            {"architectures": 5},
            "architecture 5 cannot be loaded|transformers can read .*architectures",
        ),
        ("qwen3", {"model_type": "gpt2"}, "model_type gpt2 of a GPT2LMHeadModel beside .*Qwen3For"),
        # Of two that are known, transformers takes the model_type: here one with another window.
        ("mistral", {"architectures": ["LlamaForCausalLM"]}, "model_type mistral of a MistralFor"),
    ],
)
def test_a_model_that_cannot_be(hf_model, tmp_path, family, changes, message):
    """Each is told with its folder or flag, in one line, before data are read."""
    shutil.copy(hf_model(family) / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(SetupError, match=message):
        parse_arguments(
            ["--hf-model", str(tmp_path), "--output-dir", str(tmp_path / "o"), "--train-iters", "1"]
        )


def test_sliding_window():
    assert sliding_window(config_of("mistral", sliding_window=64)) == 64
    assert sliding_window(config_of("mistral", sliding_window=None)) is None
    # Qwen2 names a window that it does not use.
    assert sliding_window(config_of("qwen2", use_sliding_window=False, sliding_window=64)) is None
    assert sliding_window(config_of("qwen2", use_sliding_window=True, sliding_window=64)) == 64
    assert sliding_window(config_of("llama")) is None


@pytest.mark.parametrize(
    ("family", "options", "windowed"),
    [
        ("mistral", {"sliding_window": 24}, [1, 1]),
        ("mistral", {"sliding_window": None}, None),
        (
            "qwen2",
            {"sliding_window": 24, "max_window_layers": 1, "use_sliding_window": True},
            [0, 1],
        ),
        ("qwen2", {"sliding_window": 24, "max_window_layers": 1}, None),
        ("qwen2", {"sliding_window": 24, "max_window_layers": 2, "use_sliding_window": True}, None),
        ("llama", {"sliding_window": 24}, None),  # transformers passes over it, too
    ],
)
def test_windows_are_those_of_the_layers_of_transformers(family, options, windowed):
    flags = megatron_flags(config_of(family, **options))
    assert flags.get("window_attn_skip_freq") == windowed
    assert flags.get("window_size") == (windowed and (23, 0))


def test_folder_that_is_none(tmp_path, hf_model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SetupError, match=r"nowhere: .*(is not a|no such) folder"):
        load_hf_config(str(tmp_path / "nowhere"))
    with pytest.raises(SetupError, match=r"config\.json"):
        load_hf_config(str(tmp_path))
    config = json.loads((hf_model("qwen3") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_hf_config(str(tmp_path)).hidden_size == 64
    edit_json(tmp_path / "config.json", architectures=["GemmaForCausalLM"])
    with pytest.raises(SetupError, match="GemmaForCausalLM"):
        load_hf_config(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "method"),
    [
        ("quantization_config", {"quant_method": "fp8", "fmt": "e4m3"}, "fp8"),
        ("quantization_config", {"load_in_8bit": True}, "method not named"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_a_quantised_models_configuration_is_refused(hf_model, tmp_path, key, value, method):
    folder = shutil.copytree(hf_model("qwen3"), tmp_path / "quantised")
    edit_json(folder / "config.json", **{key: value})
    with pytest.raises(SetupError) as error:
        load_hf_config(str(folder))
    assert f"config.json has {key} ({method})" in str(error.value)
    assert "bf16 weights" in str(error.value)


@pytest.mark.parametrize(
    ("family", "key", "last", "first"),
    [("gpt_oss", "swiglu_limit", "5.17.0", "5.19.0"), ("mamba2", "n_groups", "5.19.0", "5.23.0")],
)
def test_what_an_older_transformers_computes_otherwise(monkeypatch, family, key, last, first):
    config = make_config(family)
    monkeypatch.setattr("transformers.__version__", last)
    with pytest.raises(SetupError, match=f"transformers {last} does not compute {key}"):
        check_version(config, "x")
    monkeypatch.setattr("transformers.__version__", first)
    check_version(config, "x")
    monkeypatch.setattr("transformers.__version__", last)
    setattr(config, key, {"swiglu_limit": 7.0, "n_groups": 1}[key])
    check_version(config, "x")
