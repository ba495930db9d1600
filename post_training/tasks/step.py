"""One micro batch of a task: its loss as a sum and what that is a sum over, or how many rows are right.

What `get_train_model_output` may return, and how much the micro batch then weighs in the global batch:

    (loss_sum, count)        count
    outputs.loss             the labels of the call that it came from: the mean over all tokens is the truth
    [loss, ...]              one for each
    any other scalar         1, so micro batches weigh the same
    (any of these, {name: value})     and numbers for the log, means over rows
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from post_training.errors import RankStopped
from post_training.job.watchdog import watchdog
from post_training.metrics.records import OWN_FIELDS
from post_training.metrics.step_counters import counters
from post_training.tasks.model import TaskModel
from post_training.tasks.rows import RowBatch, to_device
from post_training.training.loss import step_losses


class TaskStep:
    """A run's forward step, for a task."""

    def __init__(self, task: Any, name: str, say: Callable[[str], None]) -> None:
        """For a task.

        Args:
            task: with its three methods.
            name: for messages, as it was asked for.
            say: tells the user something, on rank 0.
        """
        self.task, self.name = task, name
        self._say: Callable[[str], None] | None = say

    def __call__(
        self, data_iterator: Iterator[RowBatch], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Run one micro batch.

        Returns:
            The sum of its losses (0 in an evaluation), and the function that Megatron asks for its weight.

        Raises:
            RankStopped: the task failed, or what it returned cannot be used.
        """
        watchdog.beat()
        batch = next(data_iterator)
        task = self.task
        if not isinstance(getattr(task, "model", None), TaskModel):
            task.model = TaskModel(model)
        values = to_device(batch.values, task.device)
        if not model.training:
            self._evaluate(batch, values)
            nothing = torch.zeros((), device=task.device)
            return nothing, functools.partial(_weighed, torch.zeros_like(nothing), batch.rows)
        task.model.forget()
        output = self._call("get_train_model_output", values)
        loss, count = self._loss(output, batch.rows)
        if not batch.rows:
            loss, count = loss * 0.0, torch.zeros_like(count)
        counters.add_documents(_lengths(values) if batch.rows else [])
        return loss, functools.partial(_weighed, count, batch.rows)

    def _evaluate(self, batch: RowBatch, values: Any) -> None:
        right = self._call("get_eval_model_output", values)
        total: Any = batch.rows
        if isinstance(right, tuple) and len(right) == 2:
            right, total = right
        try:
            right, total = float(right), float(total)
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._unusable("get_eval_model_output", right) from error
        if not batch.rows:
            return  # a row that stands for none
        if not 0 <= right <= total:
            raise RankStopped(
                f"--task {self.name}: get_eval_model_output returned {right:g} right of a batch of "
                f"{total:g} rows"
            )
        counters.add_named("eval_accuracy", right, total)

    def _call(self, method: str, values: Any) -> Any:
        """What a method of the task makes of a batch."""
        where = f"--task {self.name}: {method}"
        try:
            return getattr(self.task, method)(values)
        except KeyError as error:
            if isinstance(values, Mapping) and error.args and error.args[0] not in values:
                raise RankStopped(
                    f"{where} asks for {error.args[0]!r}; the batch that collate_fn made has "
                    f"{', '.join(map(str, values)) or 'nothing'}"
                ) from error
            raise
        except RuntimeError as error:
            if not re.search("(same|expected) device", str(error)):
                raise
            device = self.task.device
            held = {**vars(self.task), **(values if isinstance(values, Mapping) else {})}
            away = [
                f"{name} is on {value.device}"
                for name, value in held.items()
                if isinstance(value, Tensor) and value.device.type != device.type
            ]
            detail = ", ".join(away) or str(error).splitlines()[0]
            raise RankStopped(
                f"{where}: a tensor is not where the model computes ({device}): {detail}; move what the "
                f"method makes itself with .to(self.device)"
            ) from error

    def _loss(self, output: Any, rows: int) -> tuple[Tensor, Tensor]:
        """The sum of a micro batch's losses, with gradient, and its weight: scalars."""
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Mapping):
            output, named = output
            for name, value in named.items() if rows else ():
                self._add(str(name), value, rows)
        if isinstance(output, tuple) and len(output) == 2:
            return self._summed(*output)
        if isinstance(output, list) and output:
            return self._summed(sum(self._one(loss) for loss in output), len(output))
        loss = self._one(output)
        for mean, labels in self.task.model.calls:
            if mean is output:
                return self._summed(loss * labels, labels)
        if self._say is not None:
            self._say(
                f"{self.name}: its loss is no model's mean over labels and has no count: micro batches "
                f"weigh the same (return (loss_sum, count) for another weight)"
            )
            self._say = None
        return loss, torch.ones((), device=loss.device)

    def _add(self, name: str, value: Any, rows: int) -> None:
        """Count a number for the log."""
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RankStopped(
                f"--task {self.name}: {METHOD} returned {_shown(value)} as {name!r}, expected a number"
            ) from error
        if name in OWN_FIELDS:
            raise RankStopped(
                f"--task {self.name}: {METHOD} returned {name!r}, which metrics.jsonl has of its own; "
                f"give it another name"
            )
        counters.add_named(name, number * rows, float(rows))

    def _summed(self, total: Any, count: Any) -> tuple[Tensor, Tensor]:
        loss = self._one(total)
        try:
            number = float(count)
            int(number)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise self._unusable("get_train_model_output", (total, count)) from error
        if not 0 <= number < 2**31 or number != int(number):  # Megatron adds them up in 32 bits
            raise RankStopped(
                f"--task {self.name}: get_train_model_output returned a count of {number:g}, expected a "
                f"whole number from 0 to {2**31 - 1}"
            )
        if number == 0:
            # A mean of none is not a number, and nor would its gradient be.
            output = self.task.model.output
            loss = (loss if output is None else output.float().sum()) * 0.0
        return loss, torch.full((), number, device=loss.device)

    def _one(self, loss: Any) -> Tensor:
        """A scalar with gradient."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise self._unusable("get_train_model_output", loss)
        if not loss.requires_grad:
            raise RankStopped(
                f"--task {self.name}: the loss that get_train_model_output returned has no gradient: "
                f"nothing would be trained (torch.no_grad or .item() on its way?)"
            )
        return loss.reshape(()).float()

    def _unusable(self, method: str, found: Any) -> RankStopped:
        wanted = (
            "a scalar tensor, (loss_sum, count), a list of scalars, or one of these with a dictionary"
            if method == METHOD
            else "how many rows are right, or (right, total)"
        )
        return RankStopped(
            f"--task {self.name}: {method} returned {_shown(found)}, expected {wanted}"
        )


METHOD = "get_train_model_output"


def _shown(found: Any) -> str:
    """What was returned, for messages."""
    if isinstance(found, Tensor):
        return f"a tensor of shape {list(found.shape)}"
    return type(found).__name__


def _weighed(count: Tensor, rows: int, loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What Megatron wants of a micro batch: the sum with gradient, its weight, and both for its log."""
    if not loss.requires_grad:
        return loss, count.to(torch.int), {"lm loss": torch.stack([loss.detach(), count])}
    told = loss.detach()
    counters.add_losses(
        told.view(1), count.view(1), torch.zeros(1, dtype=torch.int64, device=count.device)
    )
    places = torch.arange(max(rows, 1), device=count.device)
    loss = step_losses.keep(places, told.expand(len(places)), loss)
    return loss, count.to(torch.int), {"lm loss": torch.stack([told, count])}


def _lengths(values: Any) -> list[int]:
    """Tokens of each row, where the batch says so."""
    if not isinstance(values, Mapping):
        return []
    mask, ids = values.get("attention_mask"), values.get("input_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return [int(length) for length in mask.sum(-1)]
    if isinstance(ids, Tensor) and ids.dim() == 2:
        return [ids.shape[1]] * ids.shape[0]
    return []
