"""What the CPU platform layer costs a training step: calls of its wrappers times the cost of one.

python benchmarks/platform_cost.py --data train.jsonl --tokenizer DIR

Counts the calls of every wrapped factory and method over the steps of a one-process run, and times one
wrapped call against the function beneath it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import timeit
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from post_training import platform

platform.apply()

import torch  # noqa: E402
from random_model import make_qwen3  # noqa: E402

import finetune  # noqa: E402
from post_training.platform.cpu.tensor_devices import FACTORIES, NEW_FACTORIES  # noqa: E402

calls: Counter[str] = Counter()


def count(owner: Any, name: str) -> None:
    """Count the calls of one wrapped function."""
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=20)
    options = parser.parse_args()
    console = os.fdopen(os.dup(1), "w")  # a run sends its output to train.log
    torch.set_num_threads(1)
    x = torch.zeros(1)
    plain = torch.Tensor.to.__closure__  # the wrapper keeps the original in its closure
    original = next(c.cell_contents for c in plain or () if callable(c.cell_contents))
    rounds = 200_000
    wrapped = timeit.timeit(lambda: x.to(torch.float32), number=rounds)
    direct = timeit.timeit(lambda: original(x, torch.float32), number=rounds)
    overhead = max(0.0, wrapped - direct) / rounds
    for name in FACTORIES:
        count(torch, name)
    for name in (*NEW_FACTORIES, "to", "type", "cuda", "pin_memory"):
        count(torch.Tensor, name)
    with tempfile.TemporaryDirectory() as scratch:
        model, run = Path(scratch) / "model", Path(scratch) / "run"
        make_qwen3(model, options.tokenizer, hidden=256, layers=4)
        flags = f"--seq-length 512 --global-batch-size 4 --train-iters {options.iterations} --no-save-optim"
        calls.clear()
        status = finetune.main(
            ["--hf-model", str(model), "--finetune-data-files", str(options.data), *flags.split()]
            + ["--output-dir", str(run)]
        )
        lines = (run / "metrics.jsonl").read_text().splitlines()
        records = map(json.loads, lines)
        steps = [record["step_seconds"] for record in records if "step_seconds" in record]
    assert status == 0
    per_step = sum(calls.values()) / options.iterations
    step = sorted(steps)[len(steps) // 2]
    print(
        f"{per_step:.0f} wrapped calls a step (start-up and save included), {overhead * 1e9:.0f} ns each: "
        f"{per_step * overhead * 1e3:.2f} ms of a step of {step * 1e3:.0f} ms "
        f"({per_step * overhead / step:.2%})",
        file=console,
    )


if __name__ == "__main__":
    main()
