"""Which layouts of a model fit on some devices, how much memory they take, and how fast they should be.

python scripts/plan.py --gpus 16xh100 --hf-model Qwen/Qwen2.5-7B-Instruct --seq-length 8192
python scripts/plan.py --gpus 8x80gib --check --config recipe.yaml

Takes finetune.py's flags and needs neither devices, data nor weights. With --check the layout that the
flags ask for must fit: the status is 2 where it does not. Needed is what torch is expected to allocate,
4% that its allocator cannot use, and 2 GiB for CUDA and NCCL. docs/parallelism.md says how near it is.
"""

# ruff: noqa: E402 - the device must be chosen before torch is imported

from __future__ import annotations

import argparse
import os
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

# Planned is on the host that submits, whatever it has.
if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from post_training import platform

platform.apply()

from post_training.arguments.command_line import CommandLine
from post_training.arguments.parser import parse_arguments
from post_training.arguments.ranges import Number
from post_training.errors import SetupError
from post_training.inference.quiet import hush
from post_training.layout.candidates import FLAGS
from post_training.layout.memory import check_known
from post_training.layout.planner import (
    OF_CHUNKS,
    Machines,
    Plan,
    check_fits,
    ranked,
    stages_table,
    table,
)
from post_training.recipes.recipe import flag_name


def resolve(words: list[str], machines: Machines, transformer_engine: bool) -> argparse.Namespace:
    """The arguments that a run on these devices would have.

    Raises:
        SetupError: they cannot work.
    """
    written = {flag_name(key) for key in CommandLine(words).recipe.settings}
    given = written | {flag_name(word[2:].partition("=")[0]) for word in words if word[:2] == "--"}
    added = [] if "output_dir" in given else ["--output-dir", "runs/planned"]
    if not given & {"train_iters", "num_epochs", "eval_only", "skip_train"}:
        added += ["--num-epochs", "1"]
    words += added
    # As the same flags resolve on the nodes, whatever is here.
    place = {"RANK": "0", "LOCAL_RANK": "0", "SFT_DEVICE": "cuda"}
    place["WORLD_SIZE"] = str(machines.number)
    engine = mock.patch("post_training.arguments.parser.has_transformer_engine", lambda: True)
    with mock.patch.dict(os.environ, place), engine if transformer_engine else nullcontext():
        args = parse_arguments(words)
    there: dict[str, Any] = {}
    if args.use_torch_fsdp2 and args.bf16:  # as `validate` has it: shards are fp32
        there |= {"bf16": False, "fsdp_compute_dtype": "bf16"}
    if transformer_engine:
        fused = args.transformer_impl == "transformer_engine"
        there["gradient_accumulation_fusion"] = fused
    return argparse.Namespace(**{**vars(args), **there})


def command(plan: Plan, words: list[str], args: argparse.Namespace, machines: Machines) -> str:
    """What to type on each node."""
    sizes = {"--nproc-per-node": min(machines.number, machines.per_node)}
    nodes = -(-machines.number // machines.per_node)
    start = ["python", "scripts/launch.py", *(str(w) for pair in sizes.items() for w in pair)]
    if nodes > 1:
        start += [
            "--nnodes",
            str(nodes),
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "FIRST_NODE:29500",
        ]
    batch = ["--global-batch-size", str(plan.args.global_batch_size)]
    if "--global-batch-size" in words:
        batch = []
    said = {FLAGS.get(name, name).replace("-", "_") for name in OF_CHUNKS}  # by the plan
    rest, left = [], list(words)
    while left:
        word = left.pop(0)
        name, has_value, _ = word.partition("=")
        if word[:2] == "--" and flag_name(name) in said:
            del left[: 0 if has_value else 1]
        else:
            rest.append(word)
    return shlex.join([*start, "finetune.py", *rest, *plan.flags(args), *batch])


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gpus", required=True, metavar="16xh100", help="how many of which kind")
    parser.add_argument("--hf-model", help="folder, name, or path of a config.json")
    parser.add_argument("--gpus-per-node", type=Number(int, 1, 4096), default=8, help="(default 8)")
    parser.add_argument(
        "--top", type=Number(int, 1, 4096), default=8, help="layouts to show (default 8)"
    )
    parser.add_argument("--check", action="store_true", help="only: does the given layout fit?")
    parser.add_argument(
        "--with-te",
        action="store_true",
        help="the nodes have Transformer Engine, with fused gradients",
    )
    # In one line, as the other tools say it.
    setattr(parser, "error", lambda message: parser.exit(2, f"error: {message}\n"))  # noqa: B010
    options, words = parser.parse_known_args()
    hush()
    if options.hf_model is not None:
        model = Path(options.hf_model)
        words += ["--hf-model", str(model.parent if model.name == "config.json" else model)]
    try:
        machines = Machines.of(options.gpus, options.gpus_per_node)
        args = resolve(words, machines, options.with_te)
        if options.check:
            try:
                check_known(args)
            except SetupError as error:
                print(f"not checked: {error}")
                return 0
            plan = check_fits(args, machines)
            print(f"fits: {plan.needed / 2**30:.1f} of {machines.memory / 2**30:.1f} GiB a device")
            return 0
        plans = ranked(args, machines)
    except (SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not plans:
        print("error: no layout of these devices works with these flags", file=sys.stderr)
        return 2
    print(table(plans[: options.top], machines))
    best = plans[0]
    if best.needed > machines.memory:
        print(
            f"\nnothing fits into {machines.memory / 2**30:.1f} GiB a device; the nearest, by stage in GiB:"
        )
        print(stages_table(best))
        return 2
    print(f"\nthe first, by pipeline stage in GiB:\n{stages_table(best)}")
    print(f"\n{command(best, words, args, machines)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
