"""Ranks the layouts of a number of devices: those that fit first, of them the fastest first."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from post_training.errors import SetupError
from post_training.layout.candidates import FLAGS, SIZES, passes
from post_training.layout.memory import StageMemory, stage_memory
from post_training.layout.model_size import shown_bytes
from post_training.layout.pipeline import virtual_stages
from post_training.layout.sizes import (
    FLAG_RULES,
    RULES,
    batch_multiple,
    layouts,
    overlap,
)
from post_training.layout.step_time import DEVICES, Device, step_seconds

ALL_AGAIN = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
CHUNKS = "num_virtual_stages_per_pipeline_rank"
# Flags of one layout, which another does without.
OF_CHUNKS = (
    *(CHUNKS, "num_layers_per_virtual_pipeline_stage", "pipeline_model_parallel_layout"),
    "microbatch_group_size_per_vp_stage",
)


@dataclass(frozen=True)
class Machines:
    """Devices of one kind."""

    number: int
    memory: float
    """Bytes of one."""
    device: Device | None
    """None where only its memory is known."""
    per_node: int = 8

    @classmethod
    def of(cls, text: str, per_node: int) -> Machines:
        """From `16xh100`, or `16x80gib` where the kind is not known.

        Raises:
            SetupError: it says no such thing, or they fill no whole nodes.
        """
        found = re.fullmatch(r"([1-9]\d*)x(\w+)", text.lower())
        size = found and re.fullmatch(r"([1-9]\d*)gi?b", found[2])
        if found and int(found[1]) > per_node and int(found[1]) % per_node:
            raise SetupError(
                f"--gpus {text}: these fill no whole nodes of --gpus-per-node {per_node}"
            )
        if found and size:
            return cls(int(found[1]), int(size[1]) * 2.0**30, None, per_node)
        if found and found[2] in DEVICES:
            device = DEVICES[found[2]]
            return cls(int(found[1]), device.memory, device, per_node)
        raise SetupError(
            f"--gpus {text}: expects NUMBERxKIND with one of the kinds {', '.join(DEVICES)}, or the memory "
            f"of one such as 80gib"
        )


@dataclass(frozen=True)
class Plan:
    """One layout and what it is expected to take."""

    args: argparse.Namespace
    changes: dict[str, Any]
    """Flags that make it, by destination name."""
    memory: list[StageMemory]
    """Of each pipeline stage."""
    seconds: float | None
    """Of a step; None where it cannot be told."""

    @property
    def needed(self) -> float:
        """Bytes that a device must have."""
        return max(stage.needed for stage in self.memory)

    @property
    def tokens_per_s(self) -> float:
        """Of one device; 0 where the time cannot be told."""
        tokens = self.args.global_batch_size * self.args.seq_length
        return tokens / self.seconds / self.args.world_size if self.seconds else 0.0

    def flags(self, given: argparse.Namespace) -> list[str]:
        """Words for a command line, behind those that make `given`."""
        words = []
        changes: dict[str, Any] = {**self.changes, CHUNKS: self.changes.get(CHUNKS) or 1}
        for name, value in changes.items():
            flag = f"--{FLAGS.get(name, name).replace('_', '-')}"
            was = virtual_stages(given) if name == CHUNKS else getattr(given, name)
            if value is True:
                words.append(flag)
            elif value not in (None, False) and not (
                value == was == 1 and name in (*SIZES, CHUNKS)
            ):
                words += [flag, str(value)]
        return words


def plan_of(
    args: argparse.Namespace, machines: Machines, changes: dict[str, Any] | None = None
) -> Plan:
    """What a layout is expected to take.

    Raises:
        SetupError: memory cannot be foretold.
    """
    trial = argparse.Namespace(**(vars(args) | (changes or {})))
    if not trial.global_batch_size:
        trial.global_batch_size = batch_multiple(trial)  # as a run completes it
    if changes:
        trial = argparse.Namespace(**(vars(trial) | overlap(trial)))
    memory = stage_memory(trial)
    seconds = None
    if machines.device is not None and not trial.use_torch_fsdp2:
        seconds = step_seconds(trial, machines.device, per_node=machines.per_node)
    return Plan(trial, changes or {}, memory, seconds)


def ranked(args: argparse.Namespace, machines: Machines) -> list[Plan]:
    """The best plan of each layout: those that fit by speed, then the others by memory.

    Args:
        args: arguments; their parallel sizes are not kept, other flags are.
        machines: what there is.

    Raises:
        SetupError: memory cannot be foretold.
    """
    base = argparse.Namespace(**(vars(args) | {"sequence_parallel": not args.use_torch_fsdp2}))
    base.global_batch_size = args.global_batch_size or args.world_size * args.micro_batch_size
    # As every layout has them that has data parallelism; the given one may have none.
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        if name in args.derived and not args.use_torch_fsdp2:
            setattr(base, name, True)
    # Flags that belong to the given layout.
    for name in OF_CHUNKS:
        setattr(base, name, None)
    best = []
    for candidate in layouts(base):
        tp, pp, cp, _ = (candidate.changes[name] for name in SIZES)
        across = (tp or 1) * (cp or 1)
        # A flag that a layout must do without stays in the command.
        kept = None not in candidate.changes.values() and not candidate.numbers
        short = across > max(1, args.seq_length // 128)
        if not kept or (tp or 1) > machines.per_node or short:
            continue
        sizes = {name: candidate.changes[name] for name in SIZES}
        sizes["sequence_parallel"] = bool(tp and tp > 1 and base.sequence_parallel)
        plans = [plan_of(base, machines, changes) for changes in _variants(base, sizes)]
        best.append(min(plans, key=lambda plan: _order(plan, machines)))
    return sorted(best, key=lambda plan: _order(plan, machines))


def _order(plan: Plan, machines: Machines) -> tuple[float, ...]:
    """Where times are not known, what computes nothing again and cuts into fewer parts is faster."""
    if plan.needed > machines.memory:
        return 1, plan.needed
    again = plan.args.recompute_granularity == "full"
    parts = math.prod(getattr(plan.args, name) for name in SIZES[:3])
    return 0, -plan.tokens_per_s, again, parts, plan.needed


def _variants(args: argparse.Namespace, sizes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A layout with and without virtual stages and computing layers again."""
    pp = sizes["pipeline_model_parallel_size"]
    chunks: list[int | None] = [None]
    if pp > 1:
        chunks += [n for n in range(2, args.num_layers // pp + 1) if args.num_layers // pp % n == 0]
    again: list[dict[str, Any]] = [{}]
    if args.recompute_granularity is None:
        again.append(ALL_AGAIN)
    for number in chunks:
        changes = {**sizes, CHUNKS: number}
        trial = argparse.Namespace(**(vars(args) | changes))
        if number is None or passes(trial, (*FLAG_RULES, *RULES)):
            yield from ({**changes, **each} for each in again)


def check_fits(args: argparse.Namespace, machines: Machines) -> Plan:
    """The plan of the layout as it is given.

    Raises:
        SetupError: it does not fit; with the layouts that do. Or memory cannot be foretold.
    """
    plan = plan_of(args, machines)
    if plan.needed <= machines.memory:
        return plan
    stage = max(range(len(plan.memory)), key=lambda number: plan.memory[number].needed)
    fitting = [each for each in ranked(args, machines) if each.needed <= machines.memory]
    others = "; ".join(" ".join(each.flags(args)) or "no parallel flags" for each in fitting[:3])
    raise SetupError(
        f"the layout does not fit: pipeline stage {stage} needs about {shown_bytes(int(plan.needed))} on a "
        f"device of {shown_bytes(int(machines.memory))}; "
        + (f"layouts that do: {others}" if fitting else "no layout of these devices does")
    )


def table(plans: list[Plan], machines: Machines) -> str:
    """The plans, a line each."""
    lines = ["TP PP CP EP  DP VPP recompute  GiB a device  step s  tokens/s a device"]
    for plan in plans:
        args = plan.args
        tp, pp, cp, ep = (getattr(args, name) for name in SIZES)
        dp = args.world_size // (tp * pp * cp)
        time = "-" if plan.seconds is None else f"{plan.seconds:.2f}"
        speed = "-" if plan.seconds is None else f"{plan.tokens_per_s:,.0f}"
        fits = "" if plan.needed <= machines.memory else "  does not fit"
        lines.append(
            f"{tp:2} {pp:2} {cp:2} {ep:2} {dp:3} {virtual_stages(args):3} "
            f"{args.recompute_granularity or 'none':9} {plan.needed / 2**30:13.1f} {time:>7} "
            f"{speed:>18}{fits}"
        )
    return "\n".join(lines)


def stages_table(plan: Plan) -> str:
    """Where the bytes of a plan lie, a line for each pipeline stage, in GiB."""
    names = list(StageMemory.__dataclass_fields__)
    lines = ["stage " + " ".join(f"{name:>11}" for name in [*names, "allocated", "needed"])]
    for number, stage in enumerate(plan.memory):
        values = (getattr(stage, name) / 2**30 for name in [*names, "allocated", "needed"])
        lines.append(f"{number:5} " + " ".join(f"{value:11.2f}" for value in values))
    return "\n".join(lines)
