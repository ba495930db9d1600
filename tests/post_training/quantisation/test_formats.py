"""Formats that are trained and exported, and those that are refused by name before anything starts."""

import copy

import pytest
import yaml

from data.errors import DataError
from post_training.arguments.parser import parse_arguments
from post_training.batch.splits import calibration_data
from post_training.errors import SetupError
from post_training.quantisation.formats import FP8

WEIGHTS = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 16}}}
INPUTS = {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8}}
OFF = {"quantizer_name": "*", "enable": False}
HEAD = {"quantizer_name": "*output_layer*", "enable": False}


def weights(kind="*weight_quantizer", /, *, enable=True, **cfg):
    """An entry that turns weights to 8 bits by row, or to what is given."""
    return {
        "quantizer_name": kind,
        "cfg": {"num_bits": 8, "axis": 0} | cfg,
        "enable": enable,
    }


@pytest.fixture
def parsed(hf_model, chat_data, tmp_path):
    def parse(given, *flags, family="qwen3"):
        if not isinstance(given, str):
            file = tmp_path / "format.yaml"
            file.write_text(yaml.safe_dump(given))
            given = str(file)
        return parse_arguments(
            [
                *("--hf-model", str(hf_model(family)), "--output-dir", str(tmp_path / "out")),
                *("--finetune-data-files", str(chat_data.file), "--train-iters", "2"),
                *("--seq-length", "64", "--export-quant-cfg", given, *flags),
            ]
        ).quantisation

    return parse


@pytest.mark.parametrize(
    ("name", "weights", "inputs", "block"),
    [
        ("INT8_DEFAULT_CFG", 8, 8, None),
        ("FP8_DEFAULT_CFG", FP8, FP8, None),
        ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", 4, None, 128),
        ("INT8_WEIGHT_ONLY_CFG", 8, None, None),
    ],
)
def test_of_modelopt(parsed, name, weights, inputs, block):
    found = parsed(name)
    assert (found.weight_bits, found.input_bits, found.block) == (weights, inputs, block)
    assert found.facts()["weights"] == weights


def test_of_a_file(parsed):
    found = parsed({"quant_cfg": [OFF, copy.deepcopy(WEIGHTS), HEAD], "algorithm": "max"})
    assert (found.weight_bits, found.input_bits, found.block) == (4, None, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("INT9_CFG", "ModelOpt has no such configuration; those trained here are FP8_DEFAULT_CFG,"),
        ("INT4_AWQ_CFG", "algorithm awq_lite"),
        ("INT8_SMOOTHQUANT_CFG", "algorithm smoothquant"),
        ("NVFP4_DEFAULT_CFG", "cannot be computed or exported"),
        ("MXFP8_DEFAULT_CFG", "blocks"),
        ("FP8_KV_CFG", "only weights and inputs of matrices"),
        ("FP8_PER_CHANNEL_PER_TOKEN_CFG", "scales that change with every input"),
        ("W4A8_AWQ_BETA_CFG", "algorithm awq_lite"),
        ("nowhere.yaml", "No such file"),
        ({"quant": []}, "expected keys quant_cfg"),
        ({"quant_cfg": [OFF, INPUTS]}, "no weights are quantised"),
        (
            {"quant_cfg": [OFF, WEIGHTS, INPUTS, HEAD]},
            "inputs are exported in 8 bits or FP8, beside weights",
        ),
        ({"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": {"bits": 3}}]}, "bits"),
    ],
)
def test_refused(parsed, given, message):
    with pytest.raises(SetupError, match="--export-quant-cfg") as caught:
        parsed(given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([weights(axis=1)], "axis 1: exported are one scale a matrix or an output channel"),
        ([weights(unsigned=True)], "unsigned True is not exported"),
        ([weights(fake_quant=False)], "fake_quant False is not exported"),
        ([weights(axis=None, block_sizes={-1: 0})], "expected a number of inputs for -1"),
        ([weights(axis=None, block_sizes={-1: True})], "expected a number of inputs for -1"),
        (
            [weights(), weights("*mlp*weight_quantizer", axis=None, block_sizes={-1: 16})],
            "one size",
        ),
        ([weights(), {"quantizer_name": "*", "enable": True}], "*: only weights and inputs"),
        ([weights(enable="no")], "enable 'no': expected true or false"),
        ([weights("*layers.0.*weight_quantizer")], "begin anew on every rank"),
        ([weights("*foo*weight_quantizer")], "no weights are quantised"),
        (
            [weights(), INPUTS | {"quantizer_name": "*mlp*input_quantizer"}],
            "linear_qkv: weights and",
        ),
        ([weights("*mlp*weight_quantizer"), INPUTS], "linear_qkv: weights and inputs"),
        ([{"*weight_quantizer": {"num_bits": 8}}], ": only weights and inputs"),
        (
            [weights(), weights("*linear_qvk*weight_quantizer")],
            "*linear_qvk*weight_quantizer names no",
        ),
        ([weights(), weights("*experts*weight_quantizer")], "there are self_attention.linear_qkv,"),
        ([weights(), {"quantizer_name": "*linear_fc3*", "enable": False}], "*linear_fc3* names no"),
    ],
)
def test_what_would_be_trained_but_not_exported(parsed, entries, message):
    with pytest.raises(SetupError, match="--export-quant-cfg") as caught:
        parsed({"quant_cfg": [OFF, *entries, HEAD]})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([WEIGHTS, HEAD], "must begin with"),
        ([OFF, WEIGHTS], "the output layer stays as it is"),
    ],
)
def test_all_else_is_off(parsed, entries, message):
    """ModelOpt quantises what no entry names: inputs in 8 bits too."""
    with pytest.raises(SetupError, match=message):
        parsed({"quant_cfg": entries})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora-rank", "2"), "--lora-rank: not with --export-quant-cfg"),
        (("--draft", "eagle3"), "--draft eagle3: not with"),
        (("--random-weights",), "--random-weights True: not with"),
        (("--eval-only",), "--eval-only changes no model"),
        (("--use-torch-fsdp2",), "--use-torch-fsdp2 True: not with"),
    ],
)
def test_other_flags_that_contradict(parsed, flags, message):
    with pytest.raises(SetupError) as caught:
        parsed("INT8_DEFAULT_CFG", *flags)
    assert message in str(caught.value)


def test_inputs_of_experts_are_left(parsed):
    with pytest.raises(SetupError, match="quantise weights only, as INT8_WEIGHT_ONLY_CFG"):
        parsed("FP8_DEFAULT_CFG", family="qwen3_moe")
    assert parsed("INT8_WEIGHT_ONLY_CFG", family="qwen3_moe").input_bits is None


def test_blocks_are_whole_on_every_rank(parsed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    tensor = ("--tensor-model-parallel-size", "2")
    assert parsed({"quant_cfg": [OFF, WEIGHTS, HEAD]}, *tensor).block == 16
    with pytest.raises(
        SetupError, match="blocks of 128 inputs do not divide the 64 that each of 2"
    ):
        parsed("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", *tensor)


@pytest.mark.parametrize(
    ("size", "options", "said"),
    [
        (16, {}, "the 24 that each of 2 ranks has of .*linear_proj"),  # 4 heads of 12 values
        (12, {}, None),
        (12, {"intermediate_size": 80}, "the 40 that each of 2 ranks has of .*linear_fc2"),
        (
            12,
            {"n_shared_experts": 3, "moe_intermediate_size": 36},
            "the 54 that each of 2 ranks has",
        ),
    ],
)
def test_blocks_of_latent_attention_dense_layers_and_shared_experts(
    parsed, hf_model, monkeypatch, size, options, said
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    router = {"quantizer_name": "*router*", "enable": False}
    blocks = weights(num_bits=4, axis=None, block_sizes={-1: size})
    flags = ["--hf-model", str(hf_model("deepseek_v3", **options)), "--sequence-parallel"]
    flags += ["--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]
    given = {"quant_cfg": [OFF, blocks, HEAD, router]}
    if said is None:
        assert parsed(given, *flags).block == size
        return
    with pytest.raises(SetupError, match=f"blocks of {size} inputs do not divide {said}"):
        parsed(given, *flags)


@pytest.mark.parametrize(("flag", "value"), [("--calib-dataset", "x.jsonl"), ("--calib-size", "3")])
def test_calibration_of_nothing(hf_model, chat_data, tmp_path, flag, value):
    with pytest.raises(SetupError, match=f"{flag}: nothing is quantised"):
        parse_arguments(
            [
                *("--hf-model", str(hf_model("qwen3")), "--output-dir", str(tmp_path)),
                *("--finetune-data-files", str(chat_data.file), "--train-iters", "2"),
                *(flag, value),
            ]
        )


def test_calibration_data_without_features(hf_model, tmp_path):
    with pytest.raises(SetupError, match="--calib-dataset: --offline-distillation-data brings"):
        parse_arguments(
            [
                *("--hf-model", str(hf_model("qwen3")), "--output-dir", str(tmp_path)),
                *("--offline-distillation-data", "features", "--train-iters", "2"),
                *("--export-quant-cfg", "INT8_DEFAULT_CFG", "--calib-dataset", "x.jsonl"),
            ]
        )


def test_calibration_data_that_is_not_there(hf_model, chat_data, tmp_path):
    args = parse_arguments(
        [
            *("--hf-model", str(hf_model("qwen3")), "--output-dir", str(tmp_path)),
            *("--finetune-data-files", str(chat_data.file), "--train-iters", "2"),
            *("--export-quant-cfg", "INT8_DEFAULT_CFG", "--calib-dataset", "nowhere.jsonl"),
        ]
    )
    with pytest.raises(DataError, match="--calib-dataset nowhere.jsonl: no such file"):
        calibration_data(args, {}, None)
