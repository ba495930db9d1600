"""`--config FILE.yaml`: defaults for the parser, and `config.yaml`: everything a run resolved to."""

from __future__ import annotations

import argparse
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from post_training.arguments.defaults import sft_defaults
from post_training.arguments.other_names import hint_for
from post_training.arguments.ranges import Number, Text
from post_training.errors import SetupError
from post_training.files import DERIVED

# Not flags of a run: the process's place in the job, and what is recomputed from the rest.
_NOT_WRITTEN = frozenset(
    {
        *(
            "config",
            "derived",
            "in_output_dir",
            "hf_config",
            "backend_reason",
            "lora",
            "quantisation",
            "only",
        ),
        *("rank", "world_size", "local_rank"),
    }
)


def _actions(parser: argparse.ArgumentParser) -> tuple[dict[str, Any], dict[str, Any]]:
    by_dest: dict[str, Any] = {}
    by_flag: dict[str, Any] = {}
    for action in parser._actions:
        if action.dest in ("help", "version"):
            continue
        by_dest.setdefault(action.dest, action)
        for option in action.option_strings:
            by_flag[option.lstrip("-").replace("-", "_")] = action
    return by_dest, by_flag


def _one_value(where: str, action: argparse.Action, value: Any) -> Any:
    own = isinstance(action.type, (Number, Text))
    try:
        result = action.type(value if own else str(value)) if callable(action.type) else value
    except (TypeError, ValueError, KeyError, argparse.ArgumentTypeError) as error:
        reason = str(error) if own else f"{value!r} is not valid ({error})"
        raise SetupError(f"{where}: {reason}") from error
    if action.choices is not None and result not in action.choices:
        raise SetupError(f"{where}: {value!r} is not one of {', '.join(map(str, action.choices))}")
    return result


def _converted(where: str, action: argparse.Action, value: Any) -> Any:
    """The value as the parser would have read it from the command line."""
    if value is None:
        if sft_defaults().get(action.dest, action.default) is not None:
            raise SetupError(f"{where}: has no value; give one, or leave the key out")
        return None
    if isinstance(value, bool):
        if action.nargs != 0:
            raise SetupError(f"{where}: expects a value, found {value}; quote what is meant so")
        return value
    if isinstance(value, list):
        own = isinstance(action.type, (Number, Text))
        if action.nargs is None and callable(action.type) and not own:
            # A pattern, such as that of --moe-layer-freq, which knows no spaces.
            return _one_value(where, action, str(value).replace(" ", ""))
        if action.nargs in (None, 0, "?"):
            raise SetupError(f"{where}: expects one value, found a list")
        if not value and action.default != []:
            raise SetupError(f"{where}: is an empty list; give a value, or leave the key out")
        return [_one_value(where, action, v) for v in value]
    if action.nargs == 0:
        raise SetupError(f"{where}: expects true or false, found {value!r}")
    result = _one_value(where, action, value)
    # Some flags that take several values stand for one as a plain value in their default.
    several = action.nargs in ("+", "*") and (
        action.default is None or isinstance(action.default, list)
    )
    return [result] if several else result


def flag_name(key: object) -> str:
    """A key of a file as the destination name of a flag."""
    return str(key).lstrip("-").replace("-", "_")


class _AsWritten(yaml.SafeLoader):
    """Reads plain values as they look: no key twice, of which YAML would take the last; decimal numbers."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            # As flags are compared: lr, --lr; seq-length, seq_length.
            name = flag_name(key.value)
            if seen.setdefault(name, line) != line:
                raise yaml.YAMLError(
                    f"{key.value} is given twice, in lines {seen[name]} and {line}"
                )
            seen[name] = line
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number that is the one of the command line: YAML reads 010 as 8 and 1:30 as 90."""
        whole = node.tag.endswith(":int")
        number: int | float = (
            self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        )
        text = node.value.lower().replace(".inf", "inf").replace(".nan", "nan")
        try:
            alike = repr(type(number)(text)) == repr(number)
        except ValueError:
            alike = False
        if not alike:
            raise yaml.YAMLError(
                f"{node.value} in line {node.start_mark.line + 1} is read as {number}: write a decimal "
                "number, or quote it"
            )
        return number


for _kind in ("int", "float"):
    _AsWritten.add_constructor(f"tag:yaml.org,2002:{_kind}", _AsWritten.construct_number)


def read_config_file(path: str | Path) -> Mapping[str, Any]:
    """The YAML mapping of flag names in a file; empty where it says nothing.

    Raises:
        SetupError: no such file, or not a mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _AsWritten)
    except OSError as error:
        raise SetupError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no such date; too deep
        reason = " ".join(str(error).split())
        raise SetupError(f"--config {path}: not valid YAML ({reason})") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise SetupError(
            f"--config {path}: expects a mapping of flags, found {type(content).__name__}"
        )
    return content


def apply_settings(
    parser: argparse.ArgumentParser, content: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Set defaults of `parser` from a mapping of flag names (dashes or underscores).

    Args:
        parser: with all flags.
        content: what a `--config` file says; what was derived there is left out.
        source: where it comes from, for messages.

    Returns:
        What was set, by destination name.

    Raises:
        SetupError: a key that is no flag (the nearest one is named), or a value that it does not take.
    """
    by_dest, by_flag = _actions(parser)
    defaults: dict[str, Any] = {}
    # A run's own config.yaml: what was derived there is derived anew, on this machine.
    derived = content.get(DERIVED) or []
    if not isinstance(derived, list) or not all(isinstance(name, str) for name in derived):
        raise SetupError(f"{source}: {DERIVED}: expects a list of flags, found {derived!r}")
    recomputed = set(derived)
    for key, value in content.items():
        if key == DERIVED or key in recomputed:
            continue
        name = flag_name(key)
        where = f"{source}: {key}"
        if flag_name(key) == "config":
            raise SetupError(f"{where}: a file cannot name another; write its flags here")
        if name in by_dest:
            defaults[name] = _converted(where, by_dest[name], value)
        elif name in by_flag:
            action = by_flag[name]
            if action.nargs == 0:
                # A switch under its own name: `no-rope-fusion: true` means that it is given.
                if not isinstance(value, bool):
                    raise SetupError(f"{where}: expects true or false, found {value!r}")
                defaults[action.dest] = action.const if value else not action.const
            else:
                defaults[action.dest] = _converted(where, action, value)
        else:
            raise SetupError(f"{where}: no such flag{hint_for(name, [*by_flag, *by_dest])}")
    parser.set_defaults(**defaults)
    return defaults


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, torch.dtype):
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[value]
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def resolved_config(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags resolved to, as plain values that `--config` reads back.

    Args:
        args: as parsed: not yet completed by what the run finds in its folders and its data.
    """
    result = {}
    for key, value in sorted(vars(args).items()):
        plain = _plain(value)
        if key in _NOT_WRITTEN or key.startswith("_") or key in args.in_output_dir:
            continue
        if key == "load" and "save" in args.in_output_dir and value == args.save:
            continue  # the run's own checkpoints, which are looked for first
        if plain is None or isinstance(plain, (bool, int, float, str, list)):
            result[key] = plain
    return result


def write_config(config: Mapping[str, Any], derived: list[str], path: Path) -> None:
    """Write `config.yaml`: what was derived from the machine and the model comes last, and says so."""
    written = {key: value for key, value in config.items() if key not in derived}
    rest = {key: config[key] for key in derived if key in config}
    text = (
        "# Everything this run resolved to: finetune.py --config THIS_FILE runs it again.\n"
        + yaml.safe_dump(written, sort_keys=True, allow_unicode=True)
        + "# Derived from the machine, the model and the needs of finetuning:\n"
        + yaml.safe_dump(rest, sort_keys=True, allow_unicode=True)
        + yaml.safe_dump({DERIVED: sorted(rest)}, default_flow_style=None, allow_unicode=True)
    )
    # Other ranks may be reading an earlier one.
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
