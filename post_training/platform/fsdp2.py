"""FSDP2: torch's fully sharded data parallelism under Megatron's `pretrain()`.

Every rank holds a slice of each parameter, of its gradient and of its optimizer state. A unit (a decoder
layer, the embedding) is gathered when it is needed and given back right after. Any model can be wrapped:
units are classes that it names itself (`_fsdp_modules`) besides Megatron's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import TorchFullyShardedDataParallel
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from post_training.errors import RunStopped
from post_training.machine.device import device_type


class FullyShardedModel(TorchFullyShardedDataParallel):
    """Megatron's FSDP2 wrapper with the right gradients, tied embeddings and mixed precision.

    Upstream (megatron-core 0.19.2, `core/distributed/torch_fully_sharded_data_parallel.py`) leaves
    gradients as FSDP2 averages them over ranks, whatever the loss: with `--calculate-per-token-loss` they
    must be summed and divided by the tokens of the global batch. It reduces and accumulates them in the
    dtype of the weights, and shards the embedding apart from an output layer that uses the same weights.
    """

    def __init__(
        self,
        config: Any,
        ddp_config: Any,
        module: torch.nn.Module,
        disable_bucketing: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """Shard `module` in place.

        Args:
            config: its `TransformerConfig`; computation is in `autocast_dtype`.
            ddp_config: a `TorchFullyShardedDataParallelConfig`.
            module: the model, the same on every rank.
            disable_bucketing: as in Megatron's other wrappers; FSDP2 has no buckets.
            process_group: over which to shard; by default data and context parallel ranks.
        """
        _BaseDataParallel.__init__(self, config=config, module=module)
        self.ddp_config = ddp_config
        self.process_group = process_group or parallel_state.get_data_parallel_group(
            with_context_parallel=True
        )
        # Without sharding each rank has its own weights, and `finish_grad_sync` sums the gradients.
        self.whole = getattr(config, "fsdp_sharding", "full") == "none"
        group = _alone() if self.whole else self.process_group
        self.device_mesh = DeviceMesh.from_group(group, device_type())
        compute = config.autocast_dtype
        policy = MixedPrecisionPolicy(
            param_dtype=None if compute == config.params_dtype else compute,
            reduce_dtype=torch.float32,
            # Activations have the right dtype already; the angles of rotary embeddings need all of fp32.
            cast_forward_inputs=False,
        )
        options: dict[str, Any] = {
            "mesh": self.device_mesh,
            "reshard_after_forward": ddp_config.reshard_after_forward,
            "mp_policy": policy,
        }
        # FSDP2 makes new parameters: what Megatron and its optimizer know of the old ones goes over.
        attributes = {
            name: {**vars(parameter), "is_torch_fsdp2_param": True}
            for name, parameter in module.named_parameters()
        }
        previous: list[FSDPModule] = []
        for unit in _units(module, _unit_classes(config, module)):
            sharded = fully_shard(unit, **options)
            if config.recompute_granularity is not None:
                # Recomputing a layer must not change the order in which layers are fetched.
                sharded.set_modules_to_backward_prefetch(previous)
                previous = [sharded]
        fully_shard(module, **options)
        for name, parameter in module.named_parameters():
            for key, value in attributes[name].items():
                setattr(parameter, key, value)
        if config.calculate_per_token_loss:
            for unit in module.modules():
                if isinstance(unit, FSDPModule):
                    # A sum, written in the way that gloo knows too.
                    unit.set_force_sum_reduction_for_comms(True)
                    unit.set_gradient_divide_factor(1.0)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Sum the gradients of a global batch over ranks that hold whole ones.

        Raises:
            RunStopped: there are none, which no step can go on from.
        """
        if all(parameter.grad is None for parameter in self.module.parameters()):
            raise RunStopped(
                "no weight has a gradient: the loss does not depend on the model, and nothing would be "
                "trained (is it made of what self.model of the task returned?)"
            )
        if not self.whole:
            return
        for parameter in self.module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # unused here, perhaps not elsewhere
        gradients = [_local(p.grad) for p in self.module.parameters() if p.grad is not None]
        work = [
            torch.distributed.all_reduce(gradient, group=self.process_group, async_op=True)
            for gradient in gradients
        ]
        for each in work:
            each.wait()
        if not self.config.calculate_per_token_loss:
            torch._foreach_div_(gradients, self.process_group.size())

    def scale_gradients(self, scaling_factor: float | torch.Tensor) -> None:
        """Multiply all gradients; Megatron divides them so by the tokens of the global batch.

        Args:
            scaling_factor: a number, or a tensor of one element.
        """
        gradients = [_local(p.grad) for p in self.module.parameters() if p.grad is not None]
        if isinstance(scaling_factor, torch.Tensor):
            scaling_factor = scaling_factor.reshape(())
        torch._foreach_mul_(gradients, scaling_factor)


@contextmanager
def gathered(model: torch.nn.Module) -> Iterator[None]:
    """Whole parameters on every rank meanwhile, so that each calls what is inside as often as it likes.

    The model has run once since it was wrapped; one that is not sharded is whole anyway.
    """
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    groups = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
    kept = [group.post_forward_mesh_info for group in groups]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for group, info in zip(groups, kept, strict=True):
            group.post_forward_mesh_info = info
        for unit in units:
            unit.reshard()


def _alone() -> ProcessGroup:
    """A group of this rank alone."""
    rank = torch.distributed.get_rank()
    group: Any = torch.distributed.new_group([rank], use_local_synchronization=True)
    return group


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _units(module: torch.nn.Module, classes: tuple[type, ...]) -> list[torch.nn.Module]:
    """What is gathered apart from the root: nothing that shares a weight with a module outside of it."""
    owners: dict[Any, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, set()).add(name)
    shared = [names for names in owners.values() if len(names) > 1]

    def shares(name: str) -> bool:
        inside = [sum(other.startswith(f"{name}.") for other in names) for names in shared]
        return any(0 < own < len(names) for own, names in zip(inside, shared, strict=True))

    named = [each for each in module.named_modules() if each[1] is not module]
    return [unit for name, unit in named if issubclass(type(unit), classes) and not shares(name)]


def _unit_classes(config: Any, module: torch.nn.Module) -> tuple[type, ...]:
    """Classes of the modules that are gathered and given back as one."""
    classes: set[type] = {TransformerLayer}
    if not getattr(module, "share_embeddings_and_output_weights", False):
        # Tied weights stay with the root, which is whole from the embedding to the output layer.
        classes.add(LanguageModelEmbedding)
        if config.transformer_impl != "local":
            # The output layer. The local spec's layers are made of the same class.
            classes.add(tensor_parallel.ColumnParallelLinear)
    for part in module.modules():
        classes.update(getattr(part, "_fsdp_modules", ()))
    return tuple(classes)


def apply() -> None:
    """Put the wrapper in the places of Megatron's."""
    from megatron.training import training
    from megatron.training.models import dist_utils

    setattr(dist_utils, "TorchFullyShardedDataParallel", FullyShardedModel)  # noqa: B010
    setattr(training, "torch_FSDP", FullyShardedModel)  # noqa: B010
