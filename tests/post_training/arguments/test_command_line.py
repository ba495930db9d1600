import pytest

from post_training.arguments import command_line
from post_training.arguments.command_line import CommandLine
from post_training.arguments.parser import parse_arguments
from post_training.recipes.recipe import read_recipe

CONFIGS = {
    "use_torch_fsdp2: true": True,
    "use-torch-fsdp2: true": True,
    "--use-torch-fsdp2: true": True,
    "use_torch_fsdp2: false": False,
    "lr: 1.0e-5": False,
    "- a list": False,
    "a: [": False,
    "": False,
}


@pytest.mark.parametrize("content", CONFIGS)
def test_config_file_is_looked_into(tmp_path, content):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    for words in (["--config", str(file)], [f"--config={file}", "--lr", "1"]):
        assert CommandLine(words).asks_for_fsdp2() is CONFIGS[content]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], False),
        (["--use-torch-fsdp2"], True),
        (["--lr", "1e-5", "--use-torch-fsdp2", "--bf16"], True),
        (["--use-torch"], False),  # no abbreviations, as in Megatron's parser
        (["--config", "nowhere.yaml"], False),
        (["--config"], False),
        (["--hf-model", "--use-torch-fsdp2"], True),
    ],
)
def test_words_are_looked_at(words, expected):
    assert CommandLine(words).asks_for_fsdp2() is expected


def test_file_is_read_once_and_words_win(hf_model, tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text("hf-model: nowhere\ntrain-iters: 3\nlr: 0.5")
    reads = []

    def read(path, *rest):
        reads.append(path)
        return read_recipe(path, *rest)

    monkeypatch.setattr(command_line, "read_recipe", read)
    words = ["--config", str(file), "--hf-model", str(hf_model("qwen3"))]
    command = CommandLine([*words, "--output-dir", str(tmp_path / "out")])
    assert not command.asks_for_fsdp2()
    args = parse_arguments(command)
    assert (args.train_iters, args.lr, len(reads)) == (3, 0.5, 1)
