"""The first line of a run, and `--help`: the flags that finetuning uses; `--help-all` for all there are.

Imported before torch and Megatron, and so imports nothing of them.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Sequence
from typing import Any

# Of Megatron's nine hundred: what each takes and means here.
_USED: dict[str, dict[str, str]] = {
    "steps and learning rate": {
        "train_iters": "N: steps, in the place of --num-epochs",
        "global_batch_size": "N: packs of a step, over all processes (default: one micro batch each)",
        "micro_batch_size": "N: packs that a process computes at once (default 1)",
        "seq_length": "N: tokens of a pack (default 2048)",
        "lr": "X: highest learning rate (default 1e-5)",
        "min_lr": "X: lowest one, at the end of its decay (default 0)",
        "lr_decay_style": "constant, linear, cosine (default), inverse-square-root or WSD",
        "lr_warmup_iters": "N: steps in which the learning rate rises (default 0)",
        "lr_warmup_fraction": "X: the same as a share of all steps",
        "weight_decay": "X: decoupled from the gradient (default 0)",
        "clip_grad": "X: longest gradient (default 1; 0: no clipping)",
        "optimizer": "adam (default; AdamW) or sgd",
        "adam_beta1": "X (default 0.9)",
        "adam_beta2": "X (default 0.95)",
        "seed": "N: of the packs' order and of dropout (default 1234)",
    },
    "precision and memory": {
        "bf16": "train in bf16 with fp32 optimizer (default on a GPU)",
        "fp16": "train in fp16 with a loss scale",
        "recompute_granularity": "full: compute each layer again in the backward pass; or selective",
    },
    "parallel layout (docs/parallelism.md)": {
        "tensor_model_parallel_size": "N: processes that share each matrix (default 1)",
        "pipeline_model_parallel_size": "N: stages that share the layers (default 1)",
        "context_parallel_size": "N: processes that share each pack (default 1)",
        "expert_model_parallel_size": "N: processes that share the experts (default 1)",
        "num_virtual_stages_per_pipeline_rank": "N: interleaved pipeline stages",
        "use_torch_fsdp2": "shard weights, gradients and optimizer over all processes",
        "overlap_grad_reduce": "exchange gradients while others are computed",
        "distributed_timeout_minutes": "N: until a collective gives up (default 10)",
    },
    "experts": {
        "moe_router_load_balancing_type": "seq_aux_loss: balance experts by document (default none)",
        "moe_aux_loss_coeff": "X: its weight",
    },
    "evaluation, checkpoints and logs": {
        "eval_interval": "N: steps between evaluations (default 500; -1: only at the end)",
        "eval_iters": "N: batches of an evaluation (default: whole splits; 0: none)",
        "save_interval": "N: steps between checkpoints (default 500; -1: only at the end)",
        "load": "DIR: checkpoints of another run to go on from",
        "finetune": "with --load: take only its weights",
        "async_save": "write checkpoints while training goes on",
        "exit_interval": "N: save and leave at every Nth step",
        "log_interval": "N: steps between records (default 1)",
        "wandb_project": "NAME: log to Weights & Biases too",
    },
    "other": {
        "chat_template": "FILE: a chat template in the place of the tokenizer's, or its name",
        "trust_remote_code": "run the model folder's own code",
    },
    "help": {"help": "these flags", "help_all": "every flag of Megatron and of finetuning"},
}
_OWN = ("supervised finetuning", "finetuning data")


def announce(words: Sequence[str]) -> None:
    """Say on rank 0 that the run is starting: importing torch and Megatron takes seconds, in silence.

    Args:
        words: the command line, without the program's name; where it asks for help nothing is said.
    """
    if os.environ.get("RANK", "0") == "0" and not {"-h", "--help", "--help-all"} & set(words):
        print("starting: torch and Megatron are being loaded", file=sys.stderr, flush=True)


class _HelpAll(argparse.Action):
    """Prints every flag and leaves."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        argparse.ArgumentParser.print_help(parser)
        parser.exit()


def shorten_help(parser: argparse.ArgumentParser) -> None:
    """Let `--help` show what finetuning uses, and `--help-all` everything.

    Args:
        parser: Megatron's, with this project's flags.
    """
    parser.add_argument("--help-all", action=_HelpAll, nargs=0, help="show Megatron's flags too")
    groups = {
        title: group._group_actions for group in parser._action_groups if (title := group.title)
    }
    first = {action.dest: action for action in reversed(parser._actions)}
    short = argparse.ArgumentParser(
        prog=parser.prog,
        usage="%(prog)s --hf-model MODEL --finetune-data-files FILE --num-epochs N --output-dir DIR ...",
        description=(
            "Supervised finetuning through Megatron's pretrain(). A --config file names the same flags."
        ),
        epilog=f"These are the flags that finetuning uses, of {len(first)}: --help-all shows all.",
        add_help=False,
        allow_abbrev=False,
    )
    for title in _OWN:
        group = short.add_argument_group(title)
        for action in groups[title]:
            group._add_action(action)
    for title, texts in _USED.items():
        group = short.add_argument_group(title)
        for name, text in texts.items():
            action = copy.copy(first[name])
            action.option_strings = (
                action.option_strings[:1] if name != "help" else ["-h", "--help"]
            )
            value, colon, meaning = text.partition(": ")
            if not (colon and value.isupper()):
                value, meaning = "NAME", text
            action.metavar, action.help, action.choices = value, meaning, None
            action.nargs = 0 if action.nargs == 0 else None
            group._add_action(action)
    setattr(parser, "print_help", short.print_help)  # noqa: B010
