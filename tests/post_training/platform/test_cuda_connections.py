import inspect
import os

import pytest

from post_training.platform import cuda_connections

NAME = cuda_connections.NAME


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv(NAME, "x")  # so that the test's end restores what was there
    monkeypatch.delenv(NAME)


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
def test_config_file_is_looked_into(environment, tmp_path, content):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    for words in (["--config", str(file)], [f"--config={file}", "--lr", "1"]):
        assert cuda_connections.asks_for_fsdp2(words) is CONFIGS[content]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "1"),
        (["--use-torch-fsdp2"], None),
        (["--lr", "1e-5", "--use-torch-fsdp2", "--bf16"], None),
        (["--use-torch"], "1"),  # no abbreviations, as in Megatron's parser
        (["--config", "nowhere.yaml"], "1"),
        (["--config"], "1"),
    ],
)
def test_choice(environment, words, expected):
    cuda_connections.choose(words)
    assert os.environ.get(NAME) == expected


def test_what_the_user_has_set_stays(environment, monkeypatch):
    monkeypatch.setenv(NAME, "8")
    cuda_connections.choose([])
    assert os.environ[NAME] == "8"


def test_still_needed_upstream_refuses_fsdp2_with_one_connection():
    from megatron.training import arguments

    source = inspect.getsource(arguments.validate_args)
    assert f"os.environ.get('{NAME}') != \"1\"" in source
