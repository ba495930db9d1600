"""Ids are those of tokenizer.json, whatever class and model type a folder names."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.tokenizer_survey import differs, make_folder, survey
from post_training.errors import SetupError
from post_training.hf.tokenizer import PROBES, first_difference, open_tokenizer
from tests.helpers.models import edit_json
from tests.helpers.rows import TEXT

# The rest of the 30 is run by the command.
KINDS = [
    ("PreTrainedTokenizerFast", "qwen2"),
    ("Qwen2Tokenizer", None),
    ("CodeLlamaTokenizer", "llama"),
    (None, "qwen3_moe"),
    ("LlamaTokenizer", "mistral"),
]


def sentencepiece_like() -> Tokenizer:
    """As Llama 2 and Mistral have it: spaces are a mark, written by the normalizer."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return backend


def byte_level() -> Tokenizer:
    """As Qwen has it, but for digits, which stand together, and without a normalizer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Folders as another library may have left them: tokenizer.json, and what names its special tokens."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for make in (sentencepiece_like, byte_level):
        backend = make()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            initial_alphabet=sorted({*pre_tokenizers.ByteLevel.alphabet(), "▁"}),
            special_tokens=["<unk>", "<s>", "</s>"],
            show_progress=False,
        )
        backend.train_from_iterator([TEXT, "1 22 333 4444 55555"] * 4, trainer)
        (folder / make.__name__).mkdir()
        backend.save(str(folder / make.__name__ / "tokenizer.json"))
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
        (folder / make.__name__ / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


@pytest.mark.parametrize("make", [sentencepiece_like, byte_level])
def test_ids_are_the_files_whatever_class_and_model_type_say(tokenizers, tmp_path, make):
    rows = survey(tmp_path, [tokenizers / make.__name__], [*PROBES, TEXT], KINDS)
    assert [ours for _, ours, _ in rows] == ["equal"] * len(KINDS)
    assert sum(theirs.startswith("wrong") for _, _, theirs in rows) >= 3, "it is needed"


def test_a_real_folder(test_data, tmp_path):
    mistral = test_data / "tokenizers" / "mistral-7b-instruct"
    make_folder(tmp_path / "x", mistral, "PreTrainedTokenizerFast", "qwen2")
    tokenizer = open_tokenizer(str(tmp_path / "x"), "--tokenizer")
    assert differs(tokenizer, mistral / "tokenizer.json", PROBES) is None
    assert tokenizer.convert_ids_to_tokens(tokenizer("a b c")["input_ids"])[0] == "<s>"


def test_special_tokens_are_the_configurations_else_the_classs(tokenizers, tmp_path):
    """And those of a class that the file does not have are none."""
    make_folder(tmp_path / "x", tokenizers / "sentencepiece_like", "LlamaTokenizer", None)
    config = tmp_path / "x" / "tokenizer_config.json"
    edit_json(config, eos_token=None, bos_token="<mine>", pad_token="<unk>")
    tokenizer = open_tokenizer(str(tmp_path / "x"), "--tokenizer")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "<unk>")
    assert tokenizer("a<mine>")["input_ids"][-1] == tokenizer.bos_token_id == len(tokenizer) - 1
    edit_json(config, tokenizer_class="Qwen2Tokenizer")
    tokenizer = open_tokenizer(str(tmp_path / "x"), "--tokenizer")
    assert tokenizer.eos_token is None and len(tokenizer) == 501


def test_a_folder_that_lost_its_vocabulary_is_refused(tmp_path):
    """transformers 5 makes a tokenizer of special tokens only: every word would be gone from the data."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    named = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    assert AutoTokenizer.from_pretrained(tmp_path)("Two plus two")["input_ids"] == []
    with pytest.raises(SetupError, match=r"--hf-model .*: its vocabulary has no '!'"):
        open_tokenizer(str(tmp_path), "--hf-model")


def test_a_vocabulary_that_drops_letters_is_refused(tokenizers, tmp_path):
    """Without a token for what is unknown BPE leaves letters out: they would be missing from the data."""
    make_folder(tmp_path / "x", tokenizers / "byte_level", None, None)
    file = tmp_path / "x" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = []
    del content["model"]["vocab"]["w"]
    file.write_text(json.dumps(content))
    with pytest.raises(SetupError, match="its vocabulary has no 'w'"):
        open_tokenizer(str(tmp_path / "x"), "--tokenizer")


def test_a_token_of_another_id_is_refused(tokenizers, tmp_path):
    make_folder(tmp_path / "x", tokenizers / "byte_level", None, None)
    token = {"content": "<new>", "special": True}
    edit_json(tmp_path / "x" / "tokenizer_config.json", added_tokens_decoder={"777": token})
    with pytest.raises(SetupError, match="gives '<new>' the id 777, but .* gets 482"):
        open_tokenizer(str(tmp_path / "x"), "--tokenizer")
    # A word of the file would be cut out of every other.
    edit_json(
        tmp_path / "x" / "tokenizer_config.json", added_tokens_decoder={"777": {"content": "x"}}
    )
    with pytest.raises(SetupError, match="gives 'x' the id 777"):
        open_tokenizer(str(tmp_path / "x"), "--tokenizer")


def test_the_first_text_that_differs_is_named(tokenizers, tmp_path):
    make_folder(tmp_path / "x", tokenizers / "sentencepiece_like", "Qwen2Tokenizer", None)
    own = Tokenizer.from_file(str(tmp_path / "x" / "tokenizer.json"))
    assert first_difference(AutoTokenizer.from_pretrained(tmp_path / "x"), own) == PROBES[0]


def test_a_library_that_reads_the_file_otherwise_is_refused(tokenizers, tmp_path, monkeypatch):
    """As the classes of transformers 5 do, were they what its plain class is one day."""
    make_folder(tmp_path / "x", tokenizers / "sentencepiece_like", "Qwen2Tokenizer", None)
    other = AutoTokenizer.from_pretrained(tmp_path / "x")
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", lambda folder: other)
    with pytest.raises(SetupError, match=r"give other ids for 'Two plus two'"):
        open_tokenizer(str(tmp_path / "x"), "--tokenizer")
