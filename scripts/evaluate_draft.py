"""How many tokens of an exported draft its base model accepts, by speculative decoding that is really run.

python scripts/evaluate_draft.py --hf-model BASE --draft runs/draft/draft --data test.jsonl

The last assistant turn of each row is left out and answered greedily, with and without the draft: both
answers must be the same. Counts are vLLM's: drafted tokens behind the end of an answer count whole; how
many tokens a pass really gave is printed beside.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from data import DataError
from post_training.arguments.ranges import read_options
from post_training.distillation.served_draft import ServedDraft
from post_training.distillation.speculation import Acceptance, Verifier, greedy, speculate
from post_training.errors import SetupError
from post_training.hf.folder import local_model_folder
from post_training.hf.tokenizer import open_tokenizer
from post_training.inference.exact_match import encode_questions, read_questions
from post_training.inference.generate import stop_tokens
from post_training.inference.prompts import add_template_flags, open_prompts
from post_training.inference.quiet import hush, quiet_libraries


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--hf-model", required=True, help="folder or hub name of the base")
    parser.add_argument("--draft", required=True, help="folder of the exported draft")
    parser.add_argument("--data", nargs="+", required=True, help="files of held-out rows")
    parser.add_argument("--num-speculative-tokens", type=int, default=4, help="of a draft")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--limit", type=int, help="only the first so many rows")
    parser.add_argument("--json", metavar="FILE", help="write the counts and every answer")
    add_template_flags(parser)
    options = read_options(parser)
    hush()
    try:
        return _evaluate(options)
    except (SetupError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _evaluate(options: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM

    questions = read_questions(options.data)[: options.limit]
    folder = local_model_folder(options.hf_model)
    with quiet_libraries():
        tokenizer = open_tokenizer(str(folder), "--hf-model")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    draft = ServedDraft(options.draft, model.get_input_embeddings().weight.detach())
    verifier = Verifier(model, draft.input_layers)
    stops = set(stop_tokens(tokenizer, model.generation_config))
    found = Acceptance(options.num_speculative_tokens)
    prompts, _ = encode_questions(open_prompts(options, tokenizer, None), questions)
    answers = []
    for question, prompt in zip(questions, prompts, strict=True):
        plain = greedy(verifier, prompt, options.max_new_tokens, stops)
        drafted = speculate(verifier, draft, prompt, options.max_new_tokens, stops, found)
        if drafted != plain:
            raise SetupError(
                f"{question.place}: with the draft the base answers {tokenizer.decode(drafted)!r}, without "
                f"it {tokenizer.decode(plain)!r}"
            )
        answers.append(tokenizer.decode(plain))
    print(
        f"{options.draft} of {options.hf_model}: {len(questions)} answers, the same without the draft"
    )
    print(
        f"drafts {found.drafts}, drafted {found.drafts * found.proposed}, accepted "
        f"{sum(found.accepted)}; mean acceptance length {found.length:.4f}"
    )
    print("accepted by place " + " ".join(f"{rate:.3f}" for rate in found.rates))
    print(f"tokens of answers a pass {found.emitted_per_pass:.3f}")
    if options.json:
        result = {
            "base": options.hf_model,
            "draft": options.draft,
            "proposed": found.proposed,
            "drafts": found.drafts,
            "accepted": found.accepted,
            "acceptance_length": found.length,
            "emitted_per_pass": found.emitted_per_pass,
            "answers": answers,
        }
        Path(options.json).write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
