"""Answers prompts with a run's checkpoint (any parallel layout) or a HuggingFace folder.

python scripts/generate.py --output-dir runs/first --prompt "What is the capital of France?"
python scripts/generate.py --hf-model runs/first/hf --model-backend transformers --prompt "..."

Each --prompt is a user turn with the chat template applied; without --prompt, lines are read from
standard input.
"""

# ruff: noqa: E402 - the platform layer must be in place before Megatron is imported

from __future__ import annotations

import sys

from post_training import platform

platform.apply()

from data import DataError
from model_provider import model_config
from post_training.arguments.ranges import SEED, read_options
from post_training.errors import SetupError
from post_training.inference.backends import answering_parser, open_backend
from post_training.inference.quiet import hush


def main() -> int:
    """Entry point; returns the exit status."""
    parser = answering_parser(__doc__)
    parser.add_argument("--prompt", action="append", help="a user turn; may be given several times")
    parser.add_argument("--system", help="a system prompt before each user turn")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt without a chat template"
    )
    options = read_options(parser, seed=SEED)
    hush()
    prompts = options.prompt
    if prompts is None:
        if sys.stdin.isatty():
            print("one prompt a line, end with Ctrl-D:", file=sys.stderr)
        # Other bytes than UTF-8 as in the words of a command line, where they are surrogates.
        text = sys.stdin.buffer.read().decode(errors="surrogateescape")
        prompts = [line for line in text.split("\n") if line.strip()]
    try:
        if not prompts:
            raise SetupError("--prompt is missing, and standard input is empty")
        for given in [*prompts, options.system or ""]:
            if not given.isascii() and any("\ud800" <= letter <= "\udfff" for letter in given):
                raise SetupError(f"the prompt {given!r} is not UTF-8")
        backend = open_backend(options, model_config)
        system = [{"role": "system", "content": options.system}] if options.system else []
        encoded = [
            backend.tokenizer(prompt, add_special_tokens=True)["input_ids"]
            if options.raw
            else backend.prompts.encode_turns(*system, {"role": "user", "content": prompt})
            for prompt in prompts
        ]
        answers = backend.generate(encoded)
    except (SetupError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for prompt, answer in zip(prompts, answers, strict=True):
        if len(prompts) > 1:
            print(f"> {prompt}")
        print(backend.tokenizer.decode(answer, skip_special_tokens=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
