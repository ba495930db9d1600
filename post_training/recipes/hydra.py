"""What Hydra does with a configuration: its list of defaults, `key=value` after it, and interpolation.

The order follows https://hydra.cc/docs/advanced/defaults_list: a file wins over its defaults unless
`_self_` stands elsewhere among them. `hydra/...` entries are of Hydra's own process and say nothing here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from post_training.errors import SetupError

_OVERRIDE = re.compile(r"(?:\+{0,2}([A-Za-z_][\w.-]*)=(.*)|~([A-Za-z_][\w.-]*))", re.DOTALL)


def is_override(word: str) -> bool:
    """Whether a word of a command line is `key=value`, with one of Hydra's signs in front or none."""
    return _OVERRIDE.fullmatch(word) is not None


def with_overrides(
    content: Mapping[str, Any], overrides: Sequence[str], loader: type[yaml.SafeLoader], source: str
) -> Mapping[str, Any]:
    """A file's content with dotted keys set (`a.b=1`) or taken out (`~a.b`); values are YAML.

    Raises:
        SetupError: a key leads through something that holds no keys, or one to take out is not there.
    """
    result = copy.deepcopy(dict(content))
    for word in overrides:
        match = _OVERRIDE.fullmatch(word)
        assert match is not None, word
        *parents, last = (match[1] or match[3]).split(".")
        place = result
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise SetupError(f"{source}: {word}: {parent} is {place!r} there, no group of keys")
        if match[3]:
            if last not in place:
                raise SetupError(f"{source}: {word}: there is no such key in this file")
            del place[last]
            continue
        try:
            place[last] = yaml.load(match[2], loader) if match[2] else ""
        except (yaml.YAMLError, ValueError, RecursionError):  # no such date; too deep
            place[last] = match[2]
    return result


def composed(
    content: Mapping[str, Any],
    path: Path,
    read: Callable[[Path], Mapping[str, Any]],
    above: tuple[Path, ...] = (),
) -> Mapping[str, Any]:
    """A file's content over what its list of defaults names, file by file.

    Raises:
        SetupError: a file is not there, includes itself, or an entry is none of Hydra's.
    """
    if not isinstance(content.get("defaults"), list):
        return content
    if path.resolve() in above:
        raise SetupError(f"--config {path}: defaults: includes itself")
    own = {key: value for key, value in content.items() if key != "defaults"}
    entries = content["defaults"]
    result: dict[str, Any] = {}
    for entry in entries if "_self_" in entries else [*entries, "_self_"]:
        if entry == "_self_":
            result = _merged(result, own)
            continue
        for file, package, optional in _files(entry, path):
            if optional and not file.is_file():
                continue
            found = composed(read(file), file, read, (*above, path.resolve()))
            for part in reversed([] if package == "_global_" else package.split(".")):
                found = {part: found}
            result = _merged(result, found)
    return result


def _files(entry: Any, path: Path) -> Iterator[tuple[Path, str, bool]]:
    """File, package and whether it may be missing, of each configuration that an entry names."""
    if isinstance(entry, Mapping) and len(entry) == 1:
        ((name, options),) = entry.items()
    elif isinstance(entry, str):
        name, at, package = entry.partition("@")
        group, _, option = name.rpartition("/")
        name, options = (f"{group}@{package}" if at else group), option
    else:
        raise SetupError(f"--config {path}: defaults: {entry!r} is no entry of such a list")
    *words, name = str(name).split() or [""]
    group, _, package = name.partition("@")
    if group.partition("/")[0] == "hydra":
        return
    if "override" in words:
        raise SetupError(
            f"--config {path}: defaults: {entry!r}: name the option where {group} stands first"
        )
    for option in options if isinstance(options, list) else [options]:
        if option is not None:
            folder = Path(".") if group.startswith("/") else path.parent
            file = folder / group.lstrip("/") / f"{str(option).removesuffix('.yaml')}.yaml"
            place = package or group.strip("/").replace("/", ".") or "_global_"
            yield file, place, "optional" in words


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(lower)
    for key, value in upper.items():
        below = result.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        result[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return result


def interpolated(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A configuration with every `${...}` replaced, by OmegaConf.

    Raises:
        SetupError: one names nothing, or a mandatory value (`???`) is missing.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        made = OmegaConf.create(dict(content))
        found: Any = OmegaConf.to_container(made, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SetupError(f"{source}: {' '.join(str(error).split())}") from error
    return dict(found)
