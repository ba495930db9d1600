"""The words of a command line and the file of its `--config`, each read before the whole parser is there.

Megatron's parser is completed with defaults that follow from some of its own flags; and whether FSDP2 is
asked for, by flag or by a model that runs under nothing else, must be known before CUDA starts
(`machine/environment.py`).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from post_training.arguments.backend import model_backend
from post_training.arguments.config_file import flag_name, read_config_file
from post_training.errors import SetupError


class CommandLine:
    """What can be told of a command line without Megatron's parser; the file is read once."""

    def __init__(self, argv: Sequence[str], settings: Mapping[str, Any] | None = None) -> None:
        """Look for the few flags that are needed early; what is wrong with them is told by the parser.

        Args:
            argv: without the program's name.
            settings: in the place of a `--config` file, what one would say.
        """
        self.argv = list(argv)
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for flag in (
            "--config",
            "--hf-model",
            "--transformer-impl",
            "--yaml-cfg",
            "--model-backend",
            "--task",
            "--lora-rank",
            "--lora-adapter",
        ):
            early.add_argument(flag, nargs="?")
        for flag in ("--fp32", "--trust-remote-code", "--use-torch-fsdp2"):
            early.add_argument(flag, action="store_true")
        self._known, _ = early.parse_known_args(self.argv)
        file = self._known.config
        self.source = "settings" if settings is not None else f"--config {file}"
        if settings is not None or not file:
            self.settings = settings or {}

    @functools.cached_property
    def settings(self) -> Mapping[str, Any]:
        """What the file says.

        Raises:
            SetupError: it cannot be read.
        """
        return read_config_file(self._known.config)

    def value(self, name: str, written: Mapping[str, Any]) -> Any:
        """A flag's value from the words, else from `written`, by destination name; or None, or False."""
        return getattr(self._known, name) or written.get(name)

    def asks_for_fsdp2(self) -> bool:
        """Whether `--use-torch-fsdp2` is among the words or in the file."""
        try:
            written = {flag_name(key): value for key, value in self.settings.items()}
        except SetupError:
            written = {}  # told when the arguments are parsed
        backend, _ = model_backend(
            self.value("model_backend", written),
            self.value("hf_model", written),
            self.value("task", written),
        )
        return self.value("use_torch_fsdp2", written) is True or backend == "transformers"
