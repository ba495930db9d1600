"""During a run: after each evaluation the model answers every row of its files, each rank its share."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from data.errors import DataError
from data.prepare.splits import image_processor, option_fields, parse_weighted
from post_training.errors import RunStopped
from post_training.inference.backends import TransformersBackend, generation_config
from post_training.inference.exact_match import Question, Scores, evaluate, read_questions
from post_training.inference.generate import Sampling
from post_training.inference.prompts import open_prompts
from post_training.metrics.records import ANSWERS
from post_training.metrics.run_log import RunLog
from post_training.platform.fsdp2 import gathered
from post_training.platform.training_hooks import hooks

BATCH = 32
"""Prompts of one length that are answered at once."""


class Answering:
    """The questions of a run's evaluations, and how its model is asked."""

    def __init__(self, args: argparse.Namespace, tokenizer: Any) -> None:
        """Read every row.

        Args:
            args: resolved arguments, with `answer_tokens`.
            tokenizer: the run's.

        Raises:
            DataError: a row cannot be read, or has no answer; or none has the column of kinds.
        """
        self.args, self.tokenizer = args, tokenizer
        options = option_fields(args, tokenizer)["format_options"]
        self.questions: dict[str, list[Question]] = {}
        for split in ("valid", "test"):
            for path, _ in parse_weighted(getattr(args, f"{split}_data_files") or ()):
                skip = args.on_bad_row == "skip"
                rows = read_questions([path], options, args.kind_key or "kind", skip=skip)
                self.questions.setdefault(split, []).extend(rows[: args.max_rows])
        asked = [question for each in self.questions.values() for question in each]
        if args.kind_key and not any(question.kind for question in asked):
            raise DataError(f"--kind-key {args.kind_key}: no row that is to be answered has it.")
        self.split = "valid"
        hooks.on_evaluation_start.append(functools.partial(setattr, self, "split"))

    def ask(self, chunk: Any, run_log: RunLog) -> None:
        """Let the model answer the rows of the split that has just been evaluated; on all ranks.

        Args:
            chunk: the model, as Megatron wraps it, in evaluation mode.
            run_log: is told `eval_accuracy`, and that of each kind.

        Raises:
            RunStopped: on all ranks, when a row cannot be asked.
        """
        questions = self.questions[self.split]
        root: Any = unwrap_model(chunk)
        root.documents.begin("stock", None)
        root.model.generation_config = generation_config(self.args) or root.model.generation_config
        backend = TransformersBackend(
            root.model, self.tokenizer, "", Sampling(self.args.answer_tokens), BATCH
        )
        backend.prompts = open_prompts(self.args, self.tokenizer, None)
        backend.images = functools.partial(image_processor, self.args, self.tokenizer)
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        complaint, rows = None, []
        with gathered(root):
            try:
                rows = evaluate(backend, questions[rank::ranks]).rows
            except DataError as error:
                complaint = str(error)
        every: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(every, (complaint, rows))
        for complaint, _ in every:
            if complaint is not None:
                raise RunStopped(complaint)
        scores = Scores(
            [every[at % ranks][1][at // ranks] for at in range(len(questions))],
            self.args.answer_tokens,
        )
        for kind, (correct, total) in scores.by_kind().items():
            run_log.found[f"eval_accuracy/{kind}" if kind else "eval_accuracy"] = correct / total
        run_log.found |= {"correct": correct, "total": total}
        if run_log.is_writer:
            folder = Path(self.args.output_dir, ANSWERS)
            folder.mkdir(exist_ok=True)
            text = json.dumps(scores.facts(), ensure_ascii=False, indent=1) + "\n"
            (folder / f"{self.split}-{run_log.last_iteration}.json").write_text(text)
