"""Formats that are trained and exported, and those that are refused by name before anything starts."""

import copy

import pytest
import yaml

from post_training.arguments.parser import parse_arguments
from post_training.errors import SetupError
from post_training.quantisation.formats import FP8

WEIGHTS = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 16}}}
INPUTS = {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8}}


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
    found = parsed({"quant_cfg": [copy.deepcopy(WEIGHTS)], "algorithm": "max"})
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
        ({"quant_cfg": [INPUTS]}, "no weights are quantised"),
        ({"quant_cfg": [WEIGHTS, INPUTS]}, "inputs are exported in 8 bits or FP8, beside weights"),
        ({"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": {"bits": 3}}]}, "bits"),
    ],
)
def test_refused(parsed, given, message):
    with pytest.raises(SetupError, match="--export-quant-cfg") as caught:
        parsed(given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


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


def test_blocks_are_whole_on_every_rank(parsed, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    tensor = ("--tensor-model-parallel-size", "2")
    assert parsed({"quant_cfg": [WEIGHTS]}, *tensor).block == 16
    with pytest.raises(
        SetupError, match="blocks of 128 inputs do not divide the 64 that each of 2"
    ):
        parsed("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", *tensor)


def test_calibration_data_of_nothing(parsed, hf_model, chat_data, tmp_path):
    with pytest.raises(SetupError, match="--calib-dataset: nothing is quantised"):
        parse_arguments(
            [
                *("--hf-model", str(hf_model("qwen3")), "--output-dir", str(tmp_path)),
                *("--finetune-data-files", str(chat_data.file), "--train-iters", "2"),
                *("--calib-dataset", "x.jsonl"),
            ]
        )
