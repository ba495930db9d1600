"""config.json says the same to readers of transformers 4.x and 5."""

import json
from typing import Any

import pytest
from transformers import AutoConfig, GPT2Config, Qwen2_5_VLConfig

from post_training.errors import SetupError
from post_training.hf.config_json import (
    check_older_reader,
    with_limit,
    with_older_spelling,
    write_model_config,
)
from post_training.hf.rotary import rope_parameters
from tests.helpers.architectures import tiny
from tests.helpers.models import FAMILIES, edit_json, make_config

# What a reader of 4.57.6 takes where config.json lacks the key, by its configuration classes.
DEFAULTS = {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": None}
DEFAULTS |= {"num_experts": 128, "num_local_experts": 8}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_older_reader_takes_the_same(hf_model, tmp_path, family):
    base = hf_model(family)
    config = AutoConfig.from_pretrained(base)
    write_model_config(with_limit(config, 4000), tmp_path, base)
    written = json.loads((tmp_path / "config.json").read_text())
    older = DEFAULTS | {k: v for k, v in written.items() if k not in ("rope_parameters", "dtype")}
    rope = rope_parameters(config)
    if rope:
        assert older["rope_theta"] == rope.pop("rope_theta")
    else:
        assert family in ("mamba2", "nemotron_h")
    scaled = family in ("deepseek_v3", "gpt_oss", "llama")
    assert older["rope_scaling"] == (rope if scaled else None)
    assert older["torch_dtype"] == written["dtype"] == "float32"
    if family in ("mixtral", "qwen3_moe"):
        key = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}[family]
        assert older[key] == 4
    # Frequencies of yarn follow from the limit of the base.
    limit = 512 if rope.get("rope_type") == "yarn" else 4000
    assert config.max_position_embeddings == 512 and older["max_position_embeddings"] == limit
    again = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert again == config.to_dict() | {
        "max_position_embeddings": limit,
        "_name_or_path": again["_name_or_path"],
        **{key: again[key] for key in again.keys() - config.to_dict().keys()},
    }


def test_keys_of_the_base_that_nobody_knows_are_kept(hf_model, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    config = AutoConfig.from_pretrained(hf_model("qwen3"))
    config.save_pretrained(base)
    edit_json(base / "config.json", rope_theta=7.0, of_the_maker=[1])
    write_model_config(config, tmp_path, base)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["of_the_maker"] == [1] and written["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "rope_theta", 10000.0),
        ("llama", "rope_scaling", None),
        ("qwen3", "torch_dtype", "float16"),
        ("qwen3_moe", "num_experts", 128),
    ],
)
def test_what_an_older_reader_would_take_otherwise_is_refused(
    hf_model, tmp_path, family, key, value
):
    config = AutoConfig.from_pretrained(hf_model(family))
    write_model_config(config, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    check_older_reader(config, written)
    with pytest.raises(SetupError, match=r"a reader of transformers 4\.x would take"):
        check_older_reader(config, written | {key: value})


def test_it_is_read_back_where_it_is_written(tmp_path):
    """A class that knows nothing of the keys under which transformers 4.x has the rotary parameters."""
    config = GPT2Config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(SetupError, match=r"transformers 4\.x would take rope_parameters"):
        write_model_config(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_limit_that_frequencies_hang_on_stays():
    config = make_config(
        "qwen3", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    assert with_limit(config, 4000).max_position_embeddings == 512
    assert with_limit(make_config("qwen3"), 100).max_position_embeddings == 512


@pytest.mark.parametrize("family", ["gemma3_text", "mamba2", "qwen2_5_vl"])
def test_an_older_reader_takes_a_base_that_transformers_5_wrote(tmp_path, family):
    """Values by name, as 4.57.6 was seen to need them: it has no other way to them."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    if family == "qwen2_5_vl":
        config = Qwen2_5_VLConfig(text_config={"rope_parameters": rope}, tie_word_embeddings=True)
    else:
        config = tiny(family)
    config.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    both = with_older_spelling(config, before)
    text = both.get("text_config", both)
    cases: dict[str, dict[str, Any]] = {
        "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
        "mamba2": {"time_step_limit": [0.0, float("inf")]},
        "qwen2_5_vl": {
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
        },
    }
    wanted = cases[family]
    assert {key: text[key] for key in wanted} == wanted
    again = type(config).from_dict(json.loads(json.dumps(both))).get_text_config()
    assert rope_parameters(again) == rope_parameters(config.get_text_config())
