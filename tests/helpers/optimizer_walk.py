"""An optimizer that is saved and loaded under other flags, and one whose tensors are copied by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORDS = "--train-iters 20 --seq-length 64 --lr 1e-2 --min-lr 1e-3 --global-batch-size 1"
BEFORE, AFTER = range(2), range(2, 8)
"""Steps before the checkpoint and after it."""


@dataclass
class Built:
    """A model with its optimizer and schedule, without data: gradients are drawn."""

    args: Any
    chunk: Any
    optimizer: Any
    schedule: Any

    @property
    def inner(self) -> Any:
        """The one optimizer of the chain."""
        (one,) = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return one

    def main(self, parameter: Any) -> Any:
        """What the optimizer changes for a parameter: itself, or its copy in fp32."""
        if hasattr(self.inner, "model_param_group_index_map"):
            group, place = self.inner.model_param_group_index_map[parameter]
            return self.inner.optimizer.param_groups[group]["params"][place]
        return parameter if parameter.dtype == torch.float32 else parameter.main_param

    def steps(self, numbers: range) -> list[Tensor]:
        """Take steps, with gradients that depend on their number alone; the weights after them."""
        for number in numbers:
            draw = torch.Generator().manual_seed(number)
            scale = float(self.optimizer.get_loss_scale())
            for parameter in self.chunk.parameters():
                gradient = (torch.rand(parameter.shape, generator=draw) * 2 - 1) * scale
                if self.args.fp16:
                    gradient = gradient.half().float()  # beyond its range the step is left out
                self._give(parameter, gradient)
            if self.optimizer.step()[0]:
                self.schedule.step(self.args.global_batch_size)
        return self.weights()

    def _give(self, parameter: Any, gradient: Tensor) -> None:
        if hasattr(parameter, "main_grad"):
            parameter.main_grad.copy_(gradient)
            return
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(_like(gradient, parameter))

    def weights(self) -> list[Tensor]:
        """Copies of the parameters, and of what the optimizer changes for them."""
        kept = [
            t for parameter in self.chunk.parameters() for t in (parameter, self.main(parameter))
        ]
        return [_whole(t.detach()).float().clone() for t in kept]

    def take_over(self, other: Built) -> None:
        """Copy the tensors of another by hand: of its weights, moments, step count and loss scale."""
        for own, theirs in zip(self.chunk.parameters(), other.chunk.parameters(), strict=True):
            state = other.inner.optimizer.state[other.main(theirs)]
            with torch.no_grad():
                own.copy_(theirs)
                self.main(own).copy_(other.main(theirs))
            self.inner.optimizer.state[self.main(own)] = {k: v.clone() for k, v in state.items()}
        self.schedule.step(other.schedule.num_steps)
        scalers = [getattr(each.inner, "grad_scaler", None) for each in (self, other)]
        if all(hasattr(scaler, "_growth_tracker") for scaler in scalers):
            for name in ("_scale", "_growth_tracker", "_hysteresis_tracker"):
                setattr(scalers[0], name, getattr(scalers[1], name))


def _whole(tensor: Any) -> Tensor:
    result: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return result


def _like(value: Tensor, parameter: Any) -> Any:
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def build(words: Sequence[str], load: Path | None = None) -> Built:
    """Model, optimizer and schedule as `finetune.py WORDS` makes them, with a checkpoint loaded."""
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import global_vars, training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from model_provider import model_config
    from post_training.arguments.completion import complete_run, validate
    from post_training.arguments.parser import parse_arguments
    from post_training.checkpoint.store import chosen_checkpoint
    from post_training.platform.checkpoints import writer_queue

    args = parse_arguments(list(words))
    where, step = (None, None) if load is None else (str(load), 1)
    complete_run(args, load=where, ckpt_step=step, finetune=False, by_modelopt=False)
    checkpoint = None if load is None else chosen_checkpoint(load, 1)[0]
    validate(args)
    global_vars.destroy_global_vars()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    global_vars.set_global_variables(args, build_tokenizer=False)
    if not parallel_state.is_initialized():
        training.initialize_megatron()
    writer_queue.apply(args)
    chunks, optimizer, schedule = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(args, model_config(args, checkpoint)),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return Built(args, chunks[0], optimizer, schedule)


def save(built: Built, folder: Path) -> None:
    """Write a checkpoint as a run does."""
    from megatron.training.checkpointing import save_checkpoint

    built.args.save = str(folder)
    save_checkpoint(1, [built.chunk], built.optimizer, built.schedule, 0)


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def walk(
    model: str, folder: Path, cases: Mapping[str, tuple[str, str]]
) -> dict[str, tuple[bool, bool]]:
    """Save under one set of flags and go on under another; one process.

    Args:
        model: HuggingFace folder.
        folder: for checkpoints.
        cases: flags before and after, by name; "whole" among them asks for Adam that is not distributed.

    Returns:
        By name: whether the weights at the end are those of tensors that were copied by hand, and whether
        they are others than with the flags of before.
    """
    whole = folder / "whole.yaml"
    whole.write_text("use_distributed_optimizer: false")
    first = ["--hf-model", model, "--output-dir", str(folder / "out"), *WORDS.split()]

    def words(flags: str) -> list[str]:
        return [*first, *flags.replace("whole", f"--config {whole}").split()]

    found: dict[str, tuple[bool, bool]] = {}
    for before in {flags for flags, _ in cases.values()}:
        saved = build(words(before))
        saved.steps(BEFORE)
        place = folder / str(len(found))
        save(saved, place)
        changed = {name: after for name, (flags, after) in cases.items() if flags == before}
        by_hand: dict[str, list[Tensor]] = {}
        for name, after in changed.items():
            copied = build(words(after))
            copied.take_over(saved)
            by_hand[name] = copied.steps(AFTER)
        straight = saved.steps(AFTER)
        assert _equal(build(words(before), place).steps(AFTER), straight), before
        for name, after in changed.items():
            weights = build(words(after), place).steps(AFTER)
            found[name] = _equal(weights, by_hand[name]), not _equal(weights, straight)
    return found
