"""Adapters as PEFT stores them: written, read again, and what is no plain LoRA of this base is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from post_training.adapters.layers import new_factors
from post_training.adapters.peft_config import CONFIG, WEIGHTS, is_meant
from post_training.adapters.peft_folder import (
    is_of,
    read_factors,
    read_settings,
    write_adapter,
)
from post_training.adapters.settings import LoraSettings, chosen_targets
from post_training.errors import SetupError
from post_training.hf.folder import weights_digest
from tests.helpers import plain_lora
from tests.helpers.models import make_config, make_model

MODEL = make_config("qwen3", architectures=["Qwen3ForCausalLM"])
SETTINGS = LoraSettings(4, 8.0, ("v_proj", "q_proj", "embed_tokens"), rank_pattern={"v_proj": 3})

BASE = Path("nowhere")


@pytest.fixture
def folder(tmp_path):
    targets = chosen_targets(MODEL, SETTINGS)
    factors: dict[str, torch.Tensor] = {}
    for target in targets.values():
        factors |= dict(zip(target.keys, new_factors(target, 1), strict=True))
    write_adapter(tmp_path, MODEL, SETTINGS, factors, targets, dropout=0.1, base="B", digest="D")
    return tmp_path


def test_written_and_read_again(folder):
    found = read_settings(folder, MODEL, BASE)
    targets = chosen_targets(MODEL, SETTINGS)
    assert chosen_targets(MODEL, found) == targets
    assert json.loads((folder / CONFIG).read_text())["target_modules"] == [
        "embed_tokens",
        "q_proj",
        "v_proj",
    ]
    target = targets["model.layers.1.self_attn.v_proj"]
    for one, other in zip(read_factors(folder, target), new_factors(target, 1), strict=True):
        assert torch.equal(one, other)
    assert (folder / WEIGHTS).stat().st_mode == (folder / CONFIG).stat().st_mode


def test_it_is_of_the_base_that_it_says_by_digests_of_versions_before_too(tmp_path):
    base, other = tmp_path / "base", tmp_path / "other"
    for number, place in enumerate((base, other)):
        place.mkdir()
        save_file({"weight": torch.full((64, 64), float(number))}, place / "model.safetensors")
    for like in (None, "of a version before"):
        write_adapter(
            tmp_path,
            MODEL,
            SETTINGS,
            {},
            {},
            dropout=0.0,
            base="B",
            digest=weights_digest(base, like=like),
        )
        assert is_of(tmp_path, base) and not is_of(tmp_path, other)


@pytest.mark.skipif(not plain_lora.HAS_PEFT, reason="peft is not installed")
@pytest.mark.parametrize(
    "model",
    [
        make_config("qwen3_moe", architectures=["Qwen3MoeForCausalLM"], mlp_only_layers=[0]),
        make_config("deepseek_v3", architectures=["DeepseekV3ForCausalLM"]),
    ],
    ids=lambda model: model.model_type,
)
def test_peft_reads_experts_beside_layers_without_and_their_scaling(model, tmp_path):
    """It fuses their factors, and would take all modules of their names for them."""
    from peft import PeftModel

    settings = LoraSettings(4, 7.0, ("all",), rslora=True, rank_pattern={"o_proj": 3})
    targets = chosen_targets(model, settings)
    base = make_model(model)
    held = plain_lora.adapt(base, settings, peft=False)
    with torch.no_grad():
        for factor in held.values():
            factor.normal_(std=0.1)
    write_adapter(tmp_path, model, settings, held, targets, dropout=0.1, base="B", digest=None)
    again = chosen_targets(model, read_settings(tmp_path, model, BASE))
    scalings = {name: pytest.approx(target.scaling) for name, target in targets.items()}
    assert {name: target.scaling for name, target in again.items()} == scalings
    read = PeftModel.from_pretrained(make_model(model), tmp_path)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        expected, untouched = base(ids).logits, make_model(model)(ids).logits
        difference = (read.eval()(ids).logits - expected).abs().max()
    assert (expected - untouched).abs().max() > 0.1
    assert difference < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "has no peft_type"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "trained as a whole"),
        ({"target_parameters": ["experts.down_proj"]}, "fused parameters"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"of_tomorrow": True}, "of_tomorrow, which is not known"),
        ({"r": 5}, "another base or rank"),
        ({"r": 65}, "at most 64"),
        *(({"r": r}, "r is .* must be a whole number") for r in (True, "4", 4.7, 0, -4, [4])),
        *(
            ({"lora_alpha": alpha}, "lora_alpha is .* must be a number above 0")
            for alpha in (True, "8", 0, -8, 10**400, float("nan"))
        ),
        ({"lora_alpha": None}, "has no lora_alpha"),
        ({"use_rslora": "false"}, "use_rslora is .* true or false"),
        *(
            ({"rank_pattern": ranks}, "rank_pattern is .* whole numbers")
            for ranks in (["q_proj"], "q_proj", {"q_proj": "4"}, {"q_proj": 0}, {"(": 4})
        ),
        *(
            ({"alpha_pattern": {"q_proj": alpha}}, "alpha_pattern is .* numbers by")
            for alpha in (float("nan"), -1, "8")
        ),
        ({"rank_pattern": {"q_proj": 7}}, "another base or rank"),
        ({"target_modules": ["v_proj", "q_proj", "embed_tokens", "wq"]}, "names wq"),
        # Factors that PEFT would begin anew, or leave out.
        ({"target_modules": ["v_proj", "q_proj", "o_proj", "embed_tokens"]}, "means .*o_proj"),
        ({"target_modules": ["q_proj"]}, "does not mean"),
        ({"target_modules": r".*\.q_proj"}, "does not mean"),
        ({"target_modules": None}, "does not mean"),
        ({"target_modules": "("}, "target_modules is .* one pattern"),
        ({"exclude_modules": ["q_proj"]}, "does not mean"),
        ({"exclude_modules": r".*layers\.1\..*"}, "does not mean"),
        ({"layers_to_transform": [0, 1], "layers_pattern": "blocks"}, "does not mean"),
        ({"layers_to_transform": 0}, "does not mean"),
        ({"layers_to_transform": "0"}, "layers_to_transform is .* whole numbers"),
    ],
)
def test_another_kind_is_refused(folder, changes, message):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(SetupError, match=message):
        read_settings(folder, MODEL, BASE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 32}, "another base or rank"),
        ({"num_hidden_layers": 1}, "no place for model.layers.1"),
    ],
)
def test_another_base_is_refused(folder, config, message):
    other = make_config("qwen3", architectures=["Qwen3ForCausalLM"], **config)
    with pytest.raises(SetupError, match=message):
        read_settings(folder, other, BASE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_pattern": "layers", "exclude_modules": ["o_proj"], "task_type": None},
        {"target_modules": r"(.*layers.*\.)?self_attn\.[qv]_proj|.*embed_tokens"},
        {"target_modules": "all-linear"},
        {"of_tomorrow": None, "of_later": {}, "revision": "main", "peft_version": "0.99"},
    ],
)
def test_spelled_in_another_way_it_is_the_same(folder, changes):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    found = chosen_targets(MODEL, read_settings(folder, MODEL, BASE))
    assert found == chosen_targets(MODEL, SETTINGS)


@pytest.mark.parametrize(
    ("layers", "pattern", "name", "meant"),
    [
        ([1], None, "model.layers.1.experts.0.q_proj", True),
        ([0], None, "model.layers.1.experts.0.q_proj", False),
        (1, ["blocks", "layers"], "model.layers.1.q_proj", True),
        (1, "blocks", "model.layers.1.q_proj", False),
        ([], None, "model.layers.1.q_proj", True),
    ],
)
def test_layers_are_those_that_peft_means(layers, pattern, name, meant):
    found = {"target_modules": ["q_proj"], "layers_to_transform": layers, "layers_pattern": pattern}
    assert is_meant(found, name) == meant
    if plain_lora.HAS_PEFT:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        assert bool(check_target_module_exists(LoraConfig(**found), name)) == meant


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def test_tensors_that_mean_something_else_are_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    a, b = (tensors[f"{QUERY}.lora_{x}.weight"].clone() for x in "AB")
    for more, message in (
        ({f"{QUERY}.lora_magnitude_vector": torch.ones(1)}, "lora_magnitude_vector"),
        ({f"{QUERY}.lora_A.weight": a / 0}, "NaN or infinity"),
        ({f"{QUERY}.lora_A.weight": a.int()}, "is of I32"),
        ({f"{QUERY}.lora_A.weight": a.t().contiguous()}, "another base or rank"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": a}, "does not begin with base_model"),
        ({f"{QUERY.replace('.0.', '.7.')}.lora_B.weight": b}, "no place for model.layers.7"),
    ):
        save_file(tensors | more, folder / WEIGHTS)
        with pytest.raises(SetupError, match=message):
            read_settings(folder, MODEL, BASE)
    (folder / WEIGHTS).write_bytes(b"x")
    with pytest.raises(SetupError, match="damaged"):
        read_settings(folder, MODEL, BASE)


def test_a_stored_embedding_is_the_bases_own(folder, hf_model):
    """PEFT stores it beside its factors; trained or made larger it would be lost."""
    base = hf_model("qwen3")
    tensors = load_file(folder / WEIGHTS)
    own = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file(tensors | {key: own}, folder / WEIGHTS)
    assert read_settings(folder, MODEL, base).rank == 4
    for other in (own + 1, torch.cat([own, own[:1]])):
        save_file(tensors | {key: other}, folder / WEIGHTS)
        with pytest.raises(SetupError, match="another base's"):
            read_settings(folder, MODEL, base)
