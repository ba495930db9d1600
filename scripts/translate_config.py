"""Prints the flat recipe that a configuration becomes: ROLL's, RLinf's, or one with `base:` or `defaults:`.

    python scripts/translate_config.py FILE [key=value ...] > recipe.yaml
    python scripts/translate_config.py --config-path DIR --config-name NAME [key=value ...]

Each line names what it came from; what has no effect here follows, with the reason. `finetune.py --config`
takes the original as well as the recipe. Flags may follow as they would there: `--train-iters 100` answers
a file that leaves open what it counts.
"""

from __future__ import annotations

import sys

import yaml

from post_training.arguments.command_line import CommandLine
from post_training.errors import SetupError


def main(words: list[str]) -> int:
    """Print the recipe; returns the exit status."""
    if words and not words[0].startswith("-"):
        words = ["--config", *words]
    command = CommandLine(words)
    try:
        file, recipe = command.file, command.recipe
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if file is None:
        print(__doc__)
        return 2 if words else 0
    print(f"# {file}, written by scripts/translate_config.py")
    for key, value in recipe.settings.items():
        text = yaml.safe_dump(value, width=10**6, allow_unicode=True, default_flow_style=True)
        plain = text.removesuffix("...\n").strip()
        print(f"{key}: {plain}  # {recipe.where(key).removeprefix(f'--config {file}: ')}")
    if recipe.unused:
        print("# Without effect here:")
    for key, why in recipe.unused.items():
        print(f"#   {key}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
