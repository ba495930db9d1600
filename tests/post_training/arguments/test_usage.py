"""`--help` is short and true, and the first line comes before torch."""

import subprocess
import sys

import pytest

from post_training.arguments.parser import parse_arguments
from post_training.arguments.usage import announce


def shown(capsys, flag):
    with pytest.raises(SystemExit) as ended:
        parse_arguments([flag])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_is_short_and_help_all_is_not(capsys):
    short = shown(capsys, "--help")
    assert len(short.splitlines()) < 250
    for flag in ("--hf-model", "--finetune-data-files", "--lr X", "--overlong", "--help-all"):
        assert flag in short
    assert "--te-rng-tracker" not in short
    everything = shown(capsys, "--help-all")
    assert len(everything.splitlines()) > 3000 and "--te-rng-tracker" in everything


@pytest.mark.parametrize(
    ("rank", "words", "said"),
    [("0", ["--lr", "1"], True), ("1", ["--lr", "1"], False), ("0", ["--help"], False)],
)
def test_rank_0_says_at_once_that_it_starts(monkeypatch, capsys, rank, words, said):
    monkeypatch.setenv("RANK", rank)
    announce(words)
    assert capsys.readouterr().err == (
        "starting: torch and Megatron are being loaded\n" if said else ""
    )


def test_saying_so_loads_nothing_that_takes_time():
    code = "import sys, post_training.arguments.usage; print({'torch', 'numpy', 'yaml'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
