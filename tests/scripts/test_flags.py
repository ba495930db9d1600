"""What the tools take on their command lines: ranges and words as finetune.py does."""

import argparse
import io
import sys

import pytest

from post_training.arguments.ranges import Number, Text
from scripts import evaluate, export_hf, generate, preview

TOOLS = (evaluate, export_hf, generate, preview)


class _Captured(Exception):
    pass


@pytest.fixture(params=TOOLS, ids=lambda tool: tool.__name__.rpartition(".")[2])
def parser(request, monkeypatch):
    """A tool's parser as it stands when it reads the command line."""
    found = []

    def capture(self, *arguments):
        found.append(self)
        raise _Captured

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", capture)
    with pytest.raises(_Captured):
        request.param.main()
    monkeypatch.undo()
    return found[0]


def test_every_number_has_a_range_and_no_word_is_empty(parser, capsys):
    """A flag that somebody adds fails here until it says what it may be."""
    for action in parser._actions:
        assert action.nargs == 0 or action.type not in (None, str, int, float), action.dest
        for given in ("-1", "nan", "1e400", "9" * 30, "") if action.nargs != 0 else ():
            if isinstance(action.type, (Number, Text)) and not (given and action.type == Text()):
                with pytest.raises(SystemExit, match="2"):
                    parser.parse_args([f"{action.option_strings[0]}={given}"])
                assert f"error: {action.option_strings[0]}" in capsys.readouterr().err


def test_a_size_of_files(capsys, monkeypatch):
    for given in ("0", "1B", "infGB", "-5GB", ""):
        monkeypatch.setattr(sys, "argv", ["x", "--output-dir", "r", f"--max-shard-size={given}"])
        with pytest.raises(SystemExit, match="2"):
            export_hf.main()
        assert "error: --max-shard-size: expects a size" in capsys.readouterr().err


def test_a_prompt_that_is_no_text(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--output-dir", "r"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n")))
    assert generate.main() == 2
    assert "is not UTF-8" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["generate.py", "--output-dir", "r", "--prompt", "a\udcffb"])
    with pytest.raises(SystemExit, match="2"):
        generate.main()
    assert "is no text in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--chat-template-variables", "5"], ["--template-date", "x"]])
def test_flags_of_templates_are_read_before_the_model(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["x", "--hf-model", "/no", "--prompt", "a", *words])
    assert generate.main() == 2
    assert f"error: {' '.join(words)}: expected" in capsys.readouterr().err
