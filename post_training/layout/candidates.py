"""The parallel layouts that work on a number of processes: the planner ranks them, a refusal names one."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from post_training.errors import SetupError

SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
# Flags that a layout can do without, and how far away a layout is that leaves one of them out.
OPTIONAL = (
    (("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage"), 0.5),
    (("microbatch_group_size_per_vp_stage",), 0.25),
    (("expert_tensor_parallel_size",), 0.5),
    (("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"), 0.75),
    (("pipeline_model_parallel_layout",), 0.75),
)
FLAGS = {"microbatch_group_size_per_vp_stage": "microbatch-group-size-per-virtual-pipeline-stage"}

Rule = Callable[[argparse.Namespace], None]
Multiple = Callable[[argparse.Namespace], int]


@dataclass(frozen=True)
class Candidate:
    """A layout of this number of processes that breaks no rule."""

    changes: dict[str, int | None]
    """What it changes, by destination name (None: leave the flag out)."""
    numbers: dict[str, int]
    """Batch sizes and sequence length that must change with it."""
    distance: float
    """Sum of |log2(new / asked)| over the four parallel sizes, more for what is left out or changed."""


def candidates(
    args: argparse.Namespace,
    rules: Sequence[Rule],
    batch_multiple: Multiple,
    sequence_multiple: Multiple,
    kept: dict[str, int],
) -> Iterator[Candidate]:
    """The layouts that work, those of the nearest parallel sizes first.

    Args:
        args: arguments; not changed.
        rules: raise `SetupError` where arguments break them.
        batch_multiple: a unit of global batch sizes that work.
        sequence_multiple: what must divide the sequence length.
        kept: numbers that a run that has begun goes on with, by destination name.
    """
    for distance, changes in sorted(_cuts(args), key=_order(args)):
        # As the arguments are completed before they are checked.
        spread = bool(args.num_experts) and changes[SIZES[0]] != 1
        sequence_parallel = {"sequence_parallel": args.sequence_parallel or spread}
        trial = argparse.Namespace(**(vars(args) | kept | changes | sequence_parallel))
        added: dict[str, int] = {}
        if not passes(trial, rules):
            added = _fitting_numbers(trial, batch_multiple, sequence_multiple)
            fitted = argparse.Namespace(**(vars(trial) | added))
            if not added or added.keys() & kept.keys() or not passes(fitted, rules):
                continue
        yield Candidate(changes, added, distance + _distance_of_numbers(args, added))


def nearest(
    args: argparse.Namespace, found: Iterable[Candidate], kept: dict[str, int]
) -> dict[str, int | None] | None:
    """What the nearest of `candidates` changes; None where there is none."""
    best: Candidate | None = None
    for candidate in found:
        if best is not None and candidate.distance - _distance_of_numbers(
            args, candidate.numbers
        ) >= (best.distance):
            break  # those that follow are farther away before any number changes
        if best is None or candidate.distance < best.distance:
            best = candidate
    if best is None:
        return None
    given = {name: number for name, number in kept.items() if getattr(args, name) != number}
    return {**best.changes, **best.numbers, **given}


def passes(args: argparse.Namespace, rules: Sequence[Rule]) -> bool:
    """Whether no rule is broken."""
    try:
        for rule in rules:
            rule(args)
    except SetupError:
        return False
    return True


def _cuts(args: argparse.Namespace) -> Iterator[tuple[float, dict[str, int | None]]]:
    """Every cut of the processes, with and without the flags that may be left out."""
    divisors = [d for d in range(1, args.world_size + 1) if args.world_size % d == 0]
    asked = [max(1, getattr(args, name)) for name in SIZES]
    expert_sizes = divisors if args.num_experts else [1]
    left_out = [
        ((), group) if any(getattr(args, name) is not None for name in group[0]) else ((),)
        for group in OPTIONAL
    ]
    for *sizes, ep in product(divisors, divisors, divisors, expert_sizes):
        if args.world_size % math.prod(sizes):
            continue
        layout = (*sizes, ep)
        distance = sum(abs(math.log2(new / old)) for new, old in zip(layout, asked, strict=True))
        for dropped in product(*left_out):
            changes: dict[str, int | None] = dict(zip(SIZES, layout, strict=True))
            extra = 0.0
            for group in dropped:
                if group:
                    changes |= {name: None for name in group[0] if getattr(args, name) is not None}
                    extra += group[1]
            yield distance + extra, changes


def _order(args: argparse.Namespace) -> Callable[[tuple[float, dict[str, Any]]], tuple[float, ...]]:
    """Sorts by distance; among equals, a model cut into at least as many parts as was asked."""
    asked = math.prod(max(1, getattr(args, name)) for name in SIZES[:3])

    def key(candidate: tuple[float, dict[str, Any]]) -> tuple[float, ...]:
        distance, changes = candidate
        parts = math.prod(changes[name] for name in SIZES[:3])
        return (round(distance, 6), parts < asked, parts, *(changes[name] for name in SIZES[1:]))

    return key


def _fitting_numbers(
    trial: argparse.Namespace, batch_multiple: Multiple, sequence_multiple: Multiple
) -> dict[str, int]:
    """Batch sizes and sequence length rounded so that they can be cut.

    Returns:
        What is to be changed; nothing where no number helps.
    """
    changes: dict[str, int] = {}
    if min(trial.micro_batch_size, trial.eval_micro_batch_size or 1) < 1:
        return changes
    try:
        unit = batch_multiple(trial)
    except ZeroDivisionError:  # a flag that a rule refuses
        return changes
    for name, one in (
        ("global_batch_size", unit),
        ("eval_global_batch_size", unit * (trial.eval_micro_batch_size or 1)),
    ):
        size = getattr(trial, name)
        if size is not None and (size < 1 or size % one):
            changes[name] = nearest_multiple(size, one)
    multiple = sequence_multiple(trial)
    if trial.seq_length % multiple:
        changes["seq_length"] = -(-trial.seq_length // multiple) * multiple
    return changes


def nearest_multiple(number: int, unit: int) -> int:
    """The multiple of `unit` (at least one) that is nearest to `number`."""
    return max(1, round(number / unit)) * unit


def _distance_of_numbers(args: argparse.Namespace, changes: dict[str, int]) -> float:
    distance = 0.0
    for name, value in changes.items():
        weight = 4.0 if name == "seq_length" else 0.5
        distance += 0.25 + weight * abs(math.log2(value / max(1, getattr(args, name))))
    return distance


def describe_changes(args: argparse.Namespace, changes: dict[str, int | None]) -> str:
    """The proposal as flags: what it changes, and every parallel size above 1."""
    given, dropped = [], []
    for name, value in changes.items():
        flag = f"--{FLAGS.get(name, name).replace('_', '-')}"
        if value is None:
            dropped.append(flag)
        elif value != 1 or getattr(args, name) != 1:
            given.append(f"{flag} {value}")
    processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
    text = f"nearest that works on {processes}: {' '.join(given) or 'no parallel flags'}"
    return text + (f", without {' and '.join(dropped)}" if dropped else "")
