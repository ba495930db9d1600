"""The words of a command line and the recipe that it names, each read before the whole parser is there.

Megatron's parser is completed with defaults that follow from some of its own flags; and whether FSDP2 is
asked for, by flag or by a model that runs under nothing else, must be known before CUDA starts
(`machine/environment.py`).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from post_training.arguments.backend import model_backend
from post_training.errors import SetupError
from post_training.recipes.hydra import is_override
from post_training.recipes.recipe import Recipe, flag_name, read_recipe


class CommandLine:
    """What can be told of a command line without Megatron's parser; the recipe is read once."""

    def __init__(self, argv: Sequence[str], settings: Mapping[str, Any] | None = None) -> None:
        """Look for the few flags that are needed early; what is wrong with them is told by the parser.

        Args:
            argv: without the program's name. A recipe is named by `--config FILE`, or as Hydra's programs
                have it, by `--config-path DIR --config-name NAME`; `key=value` may follow.
            settings: in the place of a recipe, what one would say.
        """
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for flag in (
            "--hf-model",
            "--transformer-impl",
            "--yaml-cfg",
            "--model-backend",
            "--task",
        ):
            early.add_argument(flag, nargs="?")
        for flag in ("--fp32", "--trust-remote-code", "--use-torch-fsdp2"):
            early.add_argument(flag, action="store_true")
        self._named, self._overrides, self.argv = _split(argv)
        self._known, _ = early.parse_known_args(self.argv)
        if settings is not None:
            self.recipe = Recipe(settings)

    @functools.cached_property
    def recipe(self) -> Recipe:
        """What the file says that the words name; nothing where they name none.

        Raises:
            SetupError: it cannot be read, or has no meaning.
        """
        file = self.file
        given = {flag_name(word.partition("=")[0]) for word in self.argv if word[:2] == "--"}
        return Recipe({}) if file is None else read_recipe(file, self._overrides, given)

    @property
    def file(self) -> str | None:
        """The recipe that the words name.

        Raises:
            SetupError: they name two, or a folder alone.
        """
        named = self._named
        if "config_name" not in named:
            if "config_path" in named:
                raise SetupError("--config-path names a folder: add --config-name NAME")
            return named.get("config")
        if "config" in named:
            raise SetupError("--config and --config-name name two files; give one")
        name = named["config_name"]
        if name is None or named.get("config_path", "") is None:
            raise SetupError("--config-name, --config-path: expected one argument")
        name += "" if name.endswith((".yaml", ".yml")) else ".yaml"
        return str(Path(named.get("config_path") or "", name))

    def value(self, name: str, written: Mapping[str, Any]) -> Any:
        """A flag's value from the words, else from `written`, by destination name; or None, or False."""
        return getattr(self._known, name) or written.get(name)

    def asks_for_fsdp2(self) -> bool:
        """Whether `--use-torch-fsdp2` is among the words or in the file."""
        try:
            settings = self.recipe.settings
            written = {flag_name(key): value for key, value in settings.items()}
        except SetupError:
            written = {}  # told when the arguments are parsed
        backend, _ = model_backend(
            self.value("model_backend", written),
            self.value("hf_model", written),
            self.value("task", written),
        )
        return self.value("use_torch_fsdp2", written) is True or backend == "transformers"


def _split(argv: Sequence[str]) -> tuple[dict[str, str | None], list[str], list[str]]:
    """What names the recipe, the `key=value` in front of it or behind it, and all other words.

    `--config` without a word stays, for the parser to tell. A `key=value` behind another flag is that
    flag's, as in `--finetune-data-files a.jsonl=0.5 b.jsonl=0.5`.
    """
    named: dict[str, str | None] = {}
    overrides, rest, words = [], [], list(argv)
    follows = True
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        name = flag_name(flag) if flag[:2] == "--" else ""
        if name in ("config", "config_path", "config_name"):
            if not has_value:
                value = words.pop(0) if words and words[0][:2] != "--" else ""
            named[name], follows = value or None, True
            if not value and name == "config":
                rest.append(word)
        elif follows and is_override(word):
            overrides.append(word)
        else:
            rest.append(word)
            follows = False
    if not named:
        rest[:0], overrides = overrides, []  # the parser tells that they are nobody's
    return named, overrides, rest
