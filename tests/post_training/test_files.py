"""A file that lies where one of ours is expected, and is something else, gets one line."""

import argparse
import shutil

import pytest

from post_training.errors import SetupError
from post_training.hf.check import check_hf_weights
from post_training.hf.config import load_hf_config
from post_training.hf.config_json import write_model_config
from post_training.hf.folder import write_template
from post_training.hf.tokenizer import open_tokenizer
from post_training.inference.backends import MegatronBackend, TransformersBackend
from post_training.inference.generate import Sampling
from post_training.inference.load import LoadedModel
from post_training.inference.prompts import Prompts
from tests.helpers.models import edit_json, make_tokenizer

OTHERS = ("", "{", "[]", "null", "3", '"x"', "[" * 100_000)


def _tokenizer(folder):
    open_tokenizer(str(folder), "--hf-model")


def _weights(folder):
    check_hf_weights(folder, load_hf_config(str(folder)))


def _template(folder):
    write_template(folder, "new")


def _generation(folder):
    args = argparse.Namespace(hf_model=str(folder))
    loaded = LoadedModel(None, make_tokenizer(), args, "here")
    MegatronBackend(loaded, Sampling(), 1, Prompts(loaded.tokenizer))


def _answers(folder):
    TransformersBackend.load(str(folder), Sampling(), 1)


def _export(folder):
    config = load_hf_config(str(folder.parent / "whole"))
    write_model_config(config, folder, folder)


@pytest.mark.parametrize(
    ("file", "use", "more"),
    [
        ("tokenizer.json", _tokenizer, ()),
        ("tokenizer_config.json", _tokenizer, ('{"added_tokens_decoder": {"5": {}}}',)),
        ("tokenizer_config.json", _template, ()),
        ("chat_template.json", _template, ()),
        (
            "model.safetensors.index.json",
            _weights,
            ("{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": []}}'),
        ),
        (
            "generation_config.json",
            _generation,
            ('{"eos_token_id": "x"}', '{"eos_token_id": [[]]}'),
        ),
        ("generation_config.json", _answers, ()),
        ("config.json", _weights, ("{}",)),
        ("config.json", _export, ()),
    ],
)
def test_another_file_in_the_place_of_ours_is_refused(hf_model, tmp_path, file, use, more):
    shutil.copytree(hf_model("qwen3"), tmp_path / "whole")
    folder = shutil.copytree(hf_model("qwen3"), tmp_path / "model")
    (folder / "chat_template.json").write_text("{}")
    edit_json(folder / "tokenizer_config.json", model_max_length=512)
    for text in (*OTHERS, *more):
        (folder / file).write_text(text)
        with pytest.raises(SetupError) as error:
            use(folder)
        assert "\n" not in str(error.value)
