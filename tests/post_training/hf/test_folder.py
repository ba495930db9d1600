"""Files that go along with a model are copied byte for byte; a template of the user's wins."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from post_training.errors import SetupError
from post_training.hf.folder import (
    MODEL_FILES,
    TOKENIZER_FILES,
    check_export,
    copy_files,
    weights_digest,
    write_template,
)
from tests.helpers.models import make_tokenizer


def test_bytes_are_copied_and_what_is_left_of_before_goes(tmp_path):
    base, target = tmp_path / "base", tmp_path / "target"
    names = "tokenizer.json tokenizer.model merges.txt a.tiktoken generation_config.json LICENSE README.md"
    for folder, files in ((base, names), (target, "vocab.json config.json chat_template.jinja")):
        folder.mkdir()
        for name in files.split():
            (folder / name).write_bytes(f'{{ "{name}":\r\n1}}'.encode())
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("x")
    (base / "tokenizer.json").chmod(0o400)
    copied = [
        path for kind in (TOKENIZER_FILES, MODEL_FILES) for path in copy_files(base, target, kind)
    ]
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    wanted = {*names.split(), "additional_chat_templates/rag.jinja"} - {"README.md"}
    assert found == wanted | {"config.json"} and len(copied) == len(wanted)
    assert all((target / name).read_bytes() == (base / name).read_bytes() for name in wanted)
    assert (target / "tokenizer.json").stat().st_mode == (target / "LICENSE").stat().st_mode
    assert copy_files(base, base, TOKENIZER_FILES) == [] and (base / "tokenizer.json").is_file()


def test_a_template_of_the_users_is_the_only_one(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    said = json.loads(config.read_text()) | {"chat_template": "old"}
    config.write_text(json.dumps(said))
    (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}')
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("old")
    write_template(tmp_path, "new {{ é }}")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template == "new {{ é }}"
    # Readers older than chat_template.jinja.
    assert json.loads(config.read_text()) == said | {"chat_template": "new {{ é }}"}
    assert (
        json.loads((tmp_path / "chat_template.json").read_text())["chat_template"] == "new {{ é }}"
    )


def test_only_a_runs_own_export_is_written_over(tmp_path):
    """A base is a HuggingFace folder like an export: it was deleted for `--to BASE`."""
    run, base = tmp_path / "run", tmp_path / "base"
    for folder in (run / "hf", base, run / "model", tmp_path / "empty"):
        folder.mkdir(parents=True)
        if folder.name != "empty":
            (folder / "config.json").write_text("{}")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "hf").symlink_to(base)
    for free in (run / "hf", run / "model" / ".." / "hf", tmp_path / "new", tmp_path / "empty"):
        check_export(free, run)
    for taken in (base, run / "model", run, base / "config.json"):
        with pytest.raises(SetupError, match=r"--to .*: is there already"):
            check_export(taken, run)
    with pytest.raises(SetupError, match="is there already"):
        check_export(tmp_path / "link" / "hf", tmp_path / "link")
    with pytest.raises(SetupError, match="--to /proc/new: cannot be written"):
        check_export(Path("/proc/new"), run)  # rather now than when the model is loaded
    (run / "hf" / "config.json").unlink()
    (run / "hf" / "thesis.tex").write_text("")
    with pytest.raises(SetupError, match="is there already"):
        check_export(run / "hf", run)


def test_a_digest_sees_each_tensor(hf_model, tmp_path):
    """A merged adapter may have changed matrices of one name only, a small part of a file."""
    base = hf_model("qwen3", num_hidden_layers=6)
    tensors = load_file(base / "model.safetensors")
    digests = {weights_digest(base)}
    for name, value in tensors.items():
        save_file(tensors | {name: value + 1}, tmp_path / "model.safetensors", {"format": "pt"})
        digests.add(weights_digest(tmp_path))
    assert len(digests) == 1 + len(tensors)
    shutil.copyfile(base / "model.safetensors", tmp_path / "model.safetensors")
    assert weights_digest(tmp_path) == weights_digest(base)


@pytest.mark.parametrize("content", [b"", b"x", b"\2" + bytes(7) + b"[]", b"\xff" * 99])
def test_damaged_weights_have_a_digest(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert len(weights_digest(tmp_path)) == 72


def test_digests_of_versions_before_are_known(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 700)
    kept = "22ee3ef3a0421c49d4e15111b2e851d8243d8241d7f5f111c40dfbefb939ffab"
    assert weights_digest(tmp_path, like=kept) == kept != weights_digest(tmp_path)
