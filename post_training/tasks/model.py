"""A task's model: what `self.model` is, and its place under Megatron's schedule."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch import Tensor

from post_training.batch.host_tensors import host_group
from post_training.checkpoint.store import Checkpoint
from post_training.errors import RunStopped
from post_training.hf_models.build import HFModelBuilder, HFModelConfig, hf_model_config
from post_training.hf_models.model import unit_classes
from post_training.platform.fsdp2 import gathered
from post_training.platform.training_hooks import hooks


class TaskModule(MegatronModule):
    """Any module where a `GPTModel` of one stage stands; the task says what it is called with."""

    pre_process = post_process = True

    def __init__(self, config: Any, model: Any, pg_collection: Any) -> None:
        """Wrap a module.

        Args:
            config: Megatron's `TransformerConfig` of the run.
            model: the module.
            pg_collection: the run's process groups, which Megatron looks for on the model.
        """
        super().__init__(config=config)
        self.model = model
        self.pg_collection = pg_collection
        self._fsdp_modules = unit_classes(model)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """There is no stage before this one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.model(*args, **kwargs)


@dataclass
class TaskModelConfig(HFModelConfig):
    """As `HFModelConfig`; with a function that makes a model, that is the model."""

    builder: ClassVar[str] = "post_training.tasks.model.TaskModelBuilder"
    own_model: Callable[[], Any] | None = None


def task_model_config(
    args: argparse.Namespace, checkpoint: Checkpoint | None, task: Any
) -> TaskModelConfig:
    """The configuration of a task's model.

    Args:
        args: validated arguments.
        checkpoint: what will be loaded, if anything.
        task: with its three methods, and perhaps `build_model`.
    """
    plain = hf_model_config(args, checkpoint)
    config = TaskModelConfig(**{f.name: getattr(plain, f.name) for f in fields(plain)})
    config.own_model = getattr(task, "build_model", None)
    if config.own_model is not None:
        # Made whole, with weights of its own; a checkpoint's come in their place.
        config.weights, config.seed = None, args.seed
    return config


class TaskModelBuilder(HFModelBuilder):
    """Builds the model of a task: that of `--hf-model`, or the task's own."""

    def build_model(
        self,
        pg_collection: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Any:
        """The whole model.

        Raises:
            RunStopped: the task's own is no module.
        """
        config: Any = self._model_config
        if config.own_model is None:
            return super().build_model(pg_collection, pre_process, post_process, vp_stage)
        torch.manual_seed(config.seed)
        model = config.own_model()
        if not isinstance(model, torch.nn.Module):
            raise RunStopped(f"build_model of the task returned {type(model).__name__}, no module")
        model = model.to(config.transformer.params_dtype)
        _agree(model.state_dict().values())
        hooks.on_step.append(lambda step: _agree(model.buffers()))
        return self.wrapped(model, pg_collection)

    def wrapped(self, model: Any, pg_collection: Any) -> Any:
        """A module that the task calls."""
        return TaskModule(self._model_config.transformer, model, pg_collection)


@torch.no_grad()
def _agree(tensors: Iterable[Any]) -> None:
    """Give every rank what the first one has: random weights, and statistics of its own rows.

    (As DistributedDataParallel does it, with `broadcast_buffers` too.)
    """
    distributed = torch.distributed
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    world: Any = distributed.group.WORLD
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            group = world if tensor.is_cuda else host_group(world)
            told = tensor.detach().contiguous()
            distributed.broadcast(told, 0, group=group)
            tensor.detach().copy_(told)


class TaskModel:
    """What a task sees as `self.model`: called, it is the model; other names are the model's own.

    Gathering of shards and casting to the run's precision happen around each call.
    """

    def __init__(self, chunk: Any) -> None:
        """See a run's model.

        Args:
            chunk: as Megatron's schedule has it, with its wrappers.
        """
        self._chunk = chunk
        self._root = unwrap_model(chunk)
        self.calls: list[tuple[Tensor, int]] = []
        """Of calls with labels since `forget`: the mean loss, and how many labels it is a mean of."""
        self.output: Tensor | None = None
        """What the last call returned first: from it a loss of nothing is made, with gradients of 0."""
        self._has_run = False

    def forget(self) -> None:
        """Forget the calls of earlier micro batches."""
        self.calls = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model as it is called, and remember how many labels its mean loss is of."""
        self._has_run = True
        outputs = self._chunk(*args, **kwargs)
        labels, loss = kwargs.get("labels"), getattr(outputs, "loss", None)
        # In their place, where a model of transformers takes them.
        shifted = kwargs.get("shift_labels")
        summed = kwargs.get("num_items_in_batch") is not None  # by the task
        if isinstance(labels, Tensor) and isinstance(loss, Tensor) and not summed:
            if self._predicts_next and isinstance(shifted, Tensor):
                labels = shifted
            elif self._predicts_next and labels.dim() > 1:
                labels = labels[..., 1:]  # nothing predicts a row's first token
            count = int((labels != -100).sum())
            self.calls.append((loss, count))
        self.output = _with_gradient(getattr(outputs, "logits", outputs))
        return outputs

    @property
    def _predicts_next(self) -> bool:
        """Whether the model shifts labels itself, as causal language models of `transformers` do."""
        from transformers.loss.loss_utils import ForCausalLMLoss

        model = self._root.model
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return False
        return getattr(model, "loss_function", None) is ForCausalLMLoss

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate` by whole weights; every rank calls it, with prompts of its own."""
        if not self._has_run and hasattr(self._root, "unshard"):
            # FSDP2 sets up its units when the root runs for the first time.
            token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            self(input_ids=token)
        with torch.no_grad(), gathered(self._root):
            return self._root.model.generate(*args, **{"synced_gpus": False, **kwargs})

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self._root.parameters()).device

    def __getattr__(self, name: str) -> Any:
        """What else the model has."""
        return getattr(self._root.model, name)


def _with_gradient(found: Any) -> Tensor | None:
    """The first tensor with a gradient in what a model returned."""
    if isinstance(found, Tensor):
        return found if found.requires_grad else None
    parts = found.values() if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping | tuple | list):
        return None
    return next((part for each in parts if (part := _with_gradient(each)) is not None), None)
