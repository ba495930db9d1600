"""A recipe: YAML of flag names, with `base: other.yaml` for what it builds on; or another system's file.

What a file says is read as the command line reads it: no key twice, and decimal numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from post_training.errors import SetupError
from post_training.files import DERIVED
from post_training.recipes import hydra
from post_training.recipes.aliases import translate
from post_training.recipes.rlinf import RLINF
from post_training.recipes.roll import ROLL

# Flags of which each takes the place of the others: in a file over its base, on the command line over both.
INSTEAD = (
    ("train_iters", "num_epochs"),
    ("lr_warmup_iters", "lr_warmup_fraction"),
    ("bf16", "fp16", "fp32"),
    (
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "pipeline_model_parallel_layout",
    ),
)


@dataclass(frozen=True)
class Recipe:
    """What a file and those below it say.

    Attributes:
        settings: values by flag name, as written.
        origin: by such a name, the file and the key that say so.
        unused: keys of another system that change nothing here, with the reason.
        sections: the file as the other system sees it; empty for one of flag names.
        system: the other system's name.
    """

    settings: Mapping[str, Any]
    origin: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None

    def where(self, key: str) -> str:
        """The place of a key, for messages."""
        return self.origin.get(key, f"settings: {key}")

    def note(self, source: str) -> str | None:
        """One line about a file of another system, for the console; None for one of flag names."""
        if self.system is None:
            return None
        rest = ", ".join(self.unused) or "nothing"
        return (
            f"{source} is {self.system}'s (scripts/translate_config.py shows what it becomes); without "
            f"effect here: {rest}"
        )


def flag_name(key: object) -> str:
    """A key of a file as the destination name of a flag."""
    return str(key).lstrip("-").replace("-", "_")


# Values that a file may hold, where each alias stands for all that it names.
_MOST_VALUES = 100_000


def _values_in(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many values a node holds, aliases written out.

    Args:
        node: of YAML.
        known: what has been counted, by node; None while it is.

    Raises:
        yaml.YAMLError: it holds itself, or more than `_MOST_VALUES`.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    line = f"line {node.start_mark.line + 1}"
    if id(node) not in known:
        known[id(node)] = None
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        known[id(node)] = 1 + sum(_values_in(part, known) for part in parts)
    count = known[id(node)]
    if count is None:
        raise yaml.YAMLError(f"the anchor in {line} holds itself")
    if count > _MOST_VALUES:
        raise yaml.YAMLError(f"from {line} on more than {_MOST_VALUES} values, with aliases")
    return count


class _AsWritten(yaml.SafeLoader):
    """Reads plain values as they look: no key twice, of which YAML would take the last; decimal numbers."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _values_in(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            # As flags are compared: lr, --lr; seq-length, seq_length.
            name = flag_name(key.value)
            if name in seen:
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


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """The YAML mapping in a file; empty where it says nothing.

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


def read_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    given: Collection[str] = (),
    above: tuple[Path, ...] = (),
) -> Recipe:
    """What a recipe says, its bases included.

    Args:
        path: of the file.
        overrides: `key=value`, which win over it: flag names, or dotted keys of another system.
        given: names of flags on the command line, which win over all.
        above: the files that build on this one.

    Raises:
        SetupError: a file cannot be read, builds on itself, or says what has no meaning here.
    """
    path = Path(path).expanduser()
    if path.resolve() in above:
        chain = " -> ".join(file.name for file in (*above, path))
        raise SetupError(f"--config {path}: base: builds on itself ({chain})")
    source = f"--config {path}"
    content = hydra.composed(read_yaml(path), path, read_yaml)
    content = hydra.with_overrides(content, overrides, _AsWritten, source)
    for system in (ROLL, RLINF):
        if isinstance(content.get(system.mark), Mapping):
            content = hydra.interpolated(content, source)
            found = translate(system, content, given, source)
            settings = _without(found.settings, given)
            return Recipe(settings, found.origin, found.unused, content, system.name)
    origin = {key: f"{source}: {key}" for key in content}
    own = _without({key: value for key, value in content.items() if key != "base"}, given)
    if "base" not in content:
        return Recipe(own, origin)
    name, names = content["base"], {flag_name(key) for key in own}
    if not isinstance(name, str) or not name.isprintable():
        raise SetupError(f"{source}: base: expects the name of one file, found {name!r}")
    base = read_recipe(path.parent / name, (), {*given, *names}, (*above, path.resolve()))
    derived = base.settings.get(DERIVED)
    # What a run derived is derived anew.
    out = {DERIVED, *derived} if isinstance(derived, list) else set()
    lower = {
        key: value
        for key, value in base.settings.items()
        if key not in out and flag_name(key) not in names
    }
    return dataclasses.replace(base, settings={**lower, **own}, origin={**base.origin, **origin})


def _without(settings: Mapping[str, Any], given: Collection[str]) -> Mapping[str, Any]:
    """Settings without those in whose place others are given."""
    out = {
        name
        for group in INSTEAD
        if not set(group).isdisjoint(given)
        for name in group
        if name not in given
    }
    return {key: value for key, value in settings.items() if flag_name(key) not in out}
