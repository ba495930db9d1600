"""From the keys of another system to flags: each is mapped, named as without effect, or refused.

A system is a table of rules by dotted key. A rule is

    "lr"                    the flag that takes the value as it is
    "*"                     of a group: each key in it is a flag of the same name
    {True: {...}, ...}      a meaning for each value
    function                (value, all values) -> a meaning
    a meaning               for all values, and for a group for all keys in it

and a meaning is flags with their values, `Unused` or `Refused`, with the reason.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from post_training.errors import SetupError

_UNKNOWN = "has no meaning here"


@dataclass(frozen=True)
class Unused:
    """What changes nothing in supervised finetuning here, and why."""

    why: str


@dataclass(frozen=True)
class Refused:
    """What cannot be done here, and what is done in its place."""

    why: str


class Values(dict[str, Any]):
    """All values of a file by dotted key, defaults of its system included.

    Attributes:
        given: names of flags that the command line says in the place of the file.
    """

    given: Collection[str] = ()

    def whole(self, key: str, default: int = 1) -> int:
        """A whole number of the file.

        Raises:
            SetupError: it is something else.
        """
        value = self.get(key)
        if value is None:
            return default
        try:
            if isinstance(value, bool) or int(value) != float(value):
                raise ValueError
        except (TypeError, ValueError, OverflowError) as error:
            raise SetupError(f"{key}: expects an integer, found {value!r}") from error
        return int(value)


Meaning = dict[str, Any] | Unused | Refused
Rule = str | Unused | Refused | Mapping[Any, Meaning] | Callable[[Any, Values], Meaning]


@dataclass(frozen=True, eq=False)
class System:
    """Another system's files.

    Attributes:
        name: as it is called.
        mark: the group by which its files are known.
        rules: by dotted key.
        defaults: what holds there where a file is silent, and is another value here.
    """

    name: str
    mark: str
    rules: Mapping[str, Rule]
    defaults: Mapping[str, Any]


@dataclass
class Translation:
    """What a file of another system becomes; see `Recipe`."""

    settings: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)


def translate(
    system: System, content: Mapping[str, Any], given: Collection[str], source: str
) -> Translation:
    """Flags for a file of another system.

    Args:
        system: whose it is.
        content: all that it says, interpolated.
        given: names of flags on the command line.
        source: what to call the file.

    Raises:
        SetupError: naming each key that is refused, unknown, or contradicts another.
    """
    leaves = list(_leaves(content))
    written = dict(leaves)
    if len(written) < len(leaves):
        keys = [key for key, _ in leaves]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise SetupError(f"{source}: {twice} is given twice, with dots and as a group")
    silent = {key: value for key, value in system.defaults.items() if written.get(key) is None}
    values = Values({**written, **silent})
    values.given = given
    found, wrong = Translation(), []
    for key, value in values.items():
        try:
            at, meaning = _meaning(system, key, value, values)
        except SetupError as error:
            raise SetupError(f"{source}: {error}") from error
        if isinstance(meaning, Refused):
            shown = "" if isinstance(value, (dict, list)) or at != key else f" {value}"
            wrong.append(f"{at}{shown}: {meaning.why}")
        elif isinstance(meaning, Unused):
            found.unused[at] = meaning.why
        else:
            by_default = "" if key not in silent else f" (default of {system.name})"
            for name, setting in meaning.items():
                if name not in found.settings:
                    found.settings[name] = setting
                    found.origin[name] = f"{source}: {key}{by_default}"
                elif found.settings[name] != setting:
                    other = found.origin[name].removeprefix(f"{source}: ")
                    wrong.append(f"{key} {value}: {other} says otherwise")
    if wrong:
        wrong.sort(key=lambda line: _UNKNOWN in line)  # what is known to be refused says more
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise SetupError(f"{source}: {'; '.join(wrong[:5])}{more}")
    return found


def _meaning(system: System, key: str, value: Any, values: Values) -> tuple[str, Meaning]:
    """The key that has a rule for `key`, which may be a group that it is in, and what the rule says."""
    at = key
    while at not in system.rules and "." in at:
        at = at.rpartition(".")[0]
    rule = system.rules.get(at)
    if rule is not None and (at == key or rule == "*" or isinstance(rule, (Unused, Refused))):
        if isinstance(rule, (Unused, Refused)):
            return at, rule
        if callable(rule):
            try:
                return key, rule(value, values)
            except (AttributeError, TypeError) as error:  # a list for a name, and the like
                return key, Refused(f"is of another type than expected ({error})")
        if value is None or value == {}:
            return key, {}
        if isinstance(rule, str):
            return key, {key.rpartition(".")[2] if rule == "*" else rule: value}
        for choice in (value, str(value).lower()):
            if isinstance(choice, (str, int)) and choice in rule:
                return key, rule[choice]
        return key, Refused(f"is not one of {', '.join(str(choice) for choice in rule)}")
    if value in (None, {}) and any(name.startswith(f"{key}.") for name in system.rules):
        return key, {}  # a group of which all keys are commented out
    near = difflib.get_close_matches(key, system.rules, n=1, cutoff=0.8)
    hint = f"; did you mean {near[0]}?" if near else "; leave it out"
    return key, Refused(f"{_UNKNOWN}{hint}")


def _leaves(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def precision(*keys: str) -> Callable[[Any, Values], Meaning]:
    """A rule for the precision of computation, which the first of some keys that has a value says."""
    flags = {"bf16": "bf16", "bfloat16": "bf16", "bf16-mixed": "bf16", "16": "fp16", "fp16": "fp16"}
    flags |= {
        "float16": "fp16",
        "16-mixed": "fp16",
        "fp32": "fp32",
        "float32": "fp32",
        "32": "fp32",
    }

    def rule(value: Any, values: Values) -> Meaning:
        if value is not None and str(value).lower() not in flags:
            return Refused(f"is not one of {', '.join(dict.fromkeys(flags.values()))}")
        said = next((values[key] for key in keys if values.get(key) is not None), None)
        flag = flags.get(str(said).lower())
        # Another key says otherwise, and counts: it is named as the source.
        if flag is None or flags.get(str(value).lower(), flag) != flag:
            return {}
        return {flag: True}

    return rule


def processes() -> int:
    """Processes of this job, as its launcher says."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


def checkpoint_to_load(value: Any, values: Values) -> Meaning:
    """A rule for the checkpoint of another run: a folder of them, or one in it."""
    if value is None or isinstance(value, bool):
        return Unused("a run goes on from what its output folder holds; another folder starts anew")
    folder, _, last = str(value).rstrip("/").rpartition("/")
    step = last.removeprefix("iter_").removeprefix("global_step_")
    if step != last and step.isdecimal():
        return {"load": folder or ".", "ckpt_step": int(step)}
    return {"load": value}


def evaluation_batch(key: str, batch: Any, micro_batch: int, values: Values) -> Meaning:
    """Flags for the micro batch of evaluations, on as many ranks and as often as a training step's.

    Args:
        key: of the file, which says how large it is.
        batch: a training step's, if the file says it.
        micro_batch: that of training.
        values: of the file.
    """
    size = values.whole(key)
    if not isinstance(batch, int) or micro_batch < 1 or batch % micro_batch:
        return {"eval_micro_batch_size": size}
    return {
        "eval_micro_batch_size": size,
        "eval_global_batch_size": batch // micro_batch * size,
    }
