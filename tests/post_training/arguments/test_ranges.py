"""Every number that a flag takes has a range, and outside it ends in one line that names the flag."""

import argparse
import contextlib
import functools
import io
import math
from types import SimpleNamespace

import pytest
from megatron.training.arguments import add_megatron_arguments

from post_training.arguments.defaults import fsdp2_defaults, sft_defaults
from post_training.arguments.parser import add_finetune_arguments, refuse
from post_training.arguments.ranges import NEVER, RANGES, Number, Other, Text, apply_ranges
from post_training.arguments.refused import ARCHITECTURE, MegatronFlags
from post_training.errors import SetupError, tell
from tests.helpers.launch import NO_PROCESS_GROUP, finetune

GIVEN = ("0", "-1", "nan", "inf", "-inf", "1" + "0" * 40, "1e300", "", " ", "1.5x")


@pytest.fixture(scope="module")
def flags():
    """The parser of a run with its ranges, the types before, and what is refused anyway."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    refused = MegatronFlags(parser).refused
    add_finetune_arguments(parser)
    types = {action.dest: action.type for action in parser._actions}
    apply_ranges(parser)
    setattr(parser, "error", functools.partial(refuse, parser))  # noqa: B010
    return SimpleNamespace(parser=parser, types=types, refused=refused)


def test_no_number_is_forgotten(flags):
    """A flag of a newer Megatron, or one of ours, fails here until somebody says what it may be."""
    plain = {action.dest for action in flags.parser._actions if action.type in (int, float)}
    assert plain - flags.refused.keys() - set(ARCHITECTURE) == set()
    assert {name: number.kind for name, number in RANGES.items()} == {
        name: flags.types.get(name) for name in RANGES
    }
    words = [action for action in flags.parser._actions if action.type in (None, str)]
    assert all(action.nargs == 0 for action in words), "an empty word would be taken"


def test_every_default_is_in_its_range(flags):
    defaults = {action.dest: action.default for action in flags.parser._actions}
    for name, value in (defaults | sft_defaults() | fsdp2_defaults()).items():
        for each in value if isinstance(value, list) else [value]:
            if name in RANGES and each is not None:
                assert RANGES[name](each) == each, name


def test_every_number_of_every_flag_is_legal_or_refused_in_one_line(flags):
    walked = taken = 0
    for action in flags.parser._actions:
        if not isinstance(action.type, Number):
            continue
        flag, number = action.option_strings[0], action.type
        for given in GIVEN:
            walked += 1
            try:
                args = flags.parser.parse_args([f"{flag}={given}"])
            except SetupError as error:
                console = io.StringIO()
                assert tell(error, console, started=False) == 2
                (line,) = console.getvalue().splitlines()
                assert flag in line and len(line) < 300, line
                assert any(text in line for text in ("expects", "must be", "choose from")), line
                continue
            taken += 1
            value = getattr(args, action.dest)
            value = value[0] if isinstance(value, list) else value
            if given in ("0", "-1") and int(given) in number.off:
                assert value == number.off[int(given)]
            else:
                assert value == float(given) and number.low <= value <= number.high, flag
                assert value > number.low or not number.above, flag
    assert walked > 1000 and 0 < taken < walked / 5


@pytest.mark.parametrize("name", sorted(RANGES))
def test_the_ends_of_a_range_are_told_apart(name):
    number = RANGES[name]
    step = 1 if number.kind is int else 1e-9

    def accepts(value):
        try:
            return number(str(number.kind(value))) is not None
        except argparse.ArgumentTypeError:
            return False

    assert accepts(number.low) is not number.above and accepts(number.high) is not number.below
    assert accepts(number.low + step)
    assert not accepts(math.nextafter(number.high, math.inf) + step)


def test_what_megatron_converts_itself_is_refused_alike(flags):
    """Names of enumerations and patterns, whose converters raise what argparse lets through."""
    own = [action for action in flags.parser._actions if isinstance(action.type, Other)]
    assert {"attention_backend", "exit_signal", "moe_layer_freq"} <= {action.dest for action in own}
    for action in own:
        flag = action.option_strings[0]
        for given in ("nonsense", "[1", "1/0"):
            with contextlib.suppress(SetupError):
                flags.parser.parse_args([f"{flag}={given}"])
    with pytest.raises(SetupError, match="--attention-backend: 'nonsense' is not valid"):
        flags.parser.parse_args(["--attention-backend", "nonsense"])


def test_an_interval_that_is_off_never_comes(flags):
    args = flags.parser.parse_args(
        "--save-interval -1 --eval-interval -1 --log-interval -1 --exit-interval -1 "
        "--exit-duration-in-mins 0 --keep-checkpoints -1 --manual-gc-interval -1".split()
    )
    assert args.save_interval == args.eval_interval == args.log_interval == NEVER
    assert args.exit_interval is args.exit_duration_in_mins is args.keep_checkpoints is None
    assert args.manual_gc_interval == 0


def test_an_empty_word_is_no_word(flags):
    """As an unset variable of a shell leaves it: --load "$BEFORE" would start from scratch."""
    for action in flags.parser._actions:
        if isinstance(action.type, Text) and action.default != "" and not action.choices:
            flag = action.option_strings[0]
            with pytest.raises(SetupError, match=f"{flag}.*: is empty; give a value"):
                flags.parser.parse_args([flag, ""])


@pytest.mark.parametrize("path", ["runs/\udcff", "runs/a\0b"])
def test_a_path_that_is_no_text_is_refused(flags, path):
    for flag in ("--output-dir", "--finetune-data-files", "--hf-model"):
        with pytest.raises(SetupError, match=f"{flag}.* is no text in UTF-8"):
            flags.parser.parse_args([flag, path])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--adam-beta2 1.5", "--adam-beta2: 1.5 is out of range: must be at least 0 and below 1"),
        (f"--chat-template {'n' * 300}", "File name too long"),
        (f"--valid-data-files {'n' * 300}", "File name too long"),
    ],
    ids=["range", "template", "data"],
)
def test_a_run_ends_before_any_process_group(hf_model, chat_data, tmp_path, words, told):
    run = finetune(
        tmp_path / "out",
        *("--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)),
        *("--train-iters", "3", *words.split()),
        environment={NO_PROCESS_GROUP: "1"},
    )
    assert run.status == 2 and "Traceback" not in run.console
    assert "error: " in run.console and told in run.console
