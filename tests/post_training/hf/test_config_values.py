"""A number of config.json that no model can have is refused, whatever transformers makes of it."""

import json
import shutil

import pytest

from post_training.errors import SetupError
from post_training.hf.config import load_hf_config, megatron_flags
from tests.helpers.models import edit_json

# Of the kinds of values that break something: none, below, of another type, not finite, huge.
WRONG: tuple[object, ...] = (
    0,
    -1,
    1.5,
    "x",
    [],
    {"a": 1},
    True,
    float("nan"),
    float("inf"),
    10**30,
    10**400,
)
SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "max_position_embeddings", "head_dim"),
    *("num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"),
)


@pytest.fixture
def folder(hf_model, tmp_path):
    """A copy of a model's configuration, for one family."""

    def copied(family):
        shutil.copy(hf_model(family) / "config.json", tmp_path)
        return tmp_path

    return copied


@pytest.mark.parametrize("key", [*SIZES, "rms_norm_eps", "initializer_range", "rope_theta"])
def test_a_number_that_no_model_has_is_refused(folder, key):
    place = folder("qwen3_moe")
    original = json.loads((place / "config.json").read_text())
    fine = {"rms_norm_eps": (), "initializer_range": (0, 1.5), "rope_theta": (1.5,)}.get(key, ())
    for value in WRONG:
        if value in fine:
            continue
        if key == "rope_theta":
            content = original | {"rope_parameters": {"rope_type": "default", key: value}}
        else:
            content = original | {key: value}
        (place / "config.json").write_text(json.dumps(content))
        # Ours, or that of transformers, which does not always name the key.
        with pytest.raises(SetupError, match=f"{key}|config.json that transformers") as error:
            megatron_flags(load_hf_config(str(place)))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("smollm3", {"hidden_size": -64}, "hidden_size -64, expected a whole number from 1"),
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers \[1\], expected 0 or 1 for each of 2"),
        ("llama", {"rope_theta": 0}, "rope_theta 0 and, in rope_parameters, 500000.0"),
        ("llama", {"torch_dtype": "junk"}, "torch_dtype 'junk', expected float32, bfloat16 or"),
        ("llama", {"dtype": 0}, "dtype 0, expected float32, bfloat16 or float16"),
        ("llama", {"dtype": "int8"}, "dtype 'int8'"),
        ("qwen3_moe", {"num_experts": -1, "num_local_experts": 4}, "readers differ"),
        ("llama", {"architectures": 3}, "architecture 3 cannot be|can read .*architectures"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4, expected a multiple of"),
        ("mistral", {"sliding_window": -1}, "sliding_window -1, expected .* or null"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok 5, expected at most the 4"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types chunked_attention is not"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha 1.5 is not supported for GptOss"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank 0, expected a whole number from 1"),
        ("deepseek_v3", {"q_lora_rank": 1.5}, "q_lora_rank"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave False is not supported"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func softmax is not supported"),
        ("deepseek_v3", {"n_group": 3}, "n_group 3, expected groups of 2 or more, all alike, of the 8"),
        ("deepseek_v3", {"n_group": 8}, "n_group 8, expected groups of 2 or more, all alike, of the 8"),
        ("deepseek_v3", {"head_dim": 16}, "head_dim 16, expected qk_rope_head_dim 8"),
        (
            "deepseek_v3",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": None,
                    "mscale_all_dim": 1.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "factor of its rotary embedding None, expected a number",
        ),
        ("nemotron_h", {"routed_scaling_factor": 0.0}, "routed_scaling_factor 0.0, expected a number"),
        ("nemotron_h", {"chunk_size": 0}, "chunk_size 0, expected a whole number from 1"),
        (
            "nemotron_h",
            {"hybrid_override_pattern": "MMMM"},
            r"hybrid_override_pattern 'MMMM', and its list of layers 'M-\*E'; readers differ",
        ),
        ("nemotron_h", {"num_hidden_layers": 9}, "num_hidden_layers 9, and its list of layers 4"),
        ("deepseek_v3", {"topk_group": 3}, "num_experts_per_tok 4, expected 2 for each of topk_group"),
        ("nemotron_h", {"routed_scaling_factor": 0}, "routed_scaling_factor 0"),
        ("nemotron_h", {"num_experts_per_tok": 5}, "from 2 to the 4 experts"),
        ("mamba2", {"n_groups": 3}, "num_heads 8, expected a multiple of n_groups 3"),
        ("mamba2", {"time_step_limit": [0.1]}, "time_step_limit .*, expected two numbers"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads 2, expected num_attention_h"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers|mlp_only_layers 3, expected a list"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}},
            "factor of its rotary embedding -2.0, expected a number above 0",
        ),
    ],
)  # fmt: skip
def test_what_contradicts_or_cannot_be_is_refused(folder, family, changes, told):
    place = folder(family)
    load_hf_config(str(place))
    edit_json(place / "config.json", **changes)
    with pytest.raises(SetupError, match=told):
        load_hf_config(str(place))
