"""Low-rank factors beside Megatron's parallel layers, the same on every layout.

A matrix that is split by rows (`ColumnParallelLinear`) has a whole A on each rank of its tensor parallel
group and its own rows of B; one that is split by columns its own columns of A and a whole B; the embedding
its own tokens of A. What crosses ranks is the product with A, of `rank` values a token. Of a fused layer
each HuggingFace matrix has factors of its own, so that no shard is in another order than the matrix.

    column   h = A x, gathered over the sequence or copied     B h: this rank's rows
    row      h = sum over ranks of A x, or its part of it      B h: all rows
    expert   tensor parallel: the dispatcher gathers tokens and adds up outputs, so nothing is done to h;
             the gradient of the whole factor is added up over the group instead
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from torch import Tensor
from torch.nn import functional

from post_training.adapters.peft_folder import read_factors
from post_training.adapters.settings import Target
from post_training.hf.weights import named_parameters

NAME = "adapter"
"""Of the module in the layer that it belongs to."""


def group_of(layer: Any) -> Any:
    """The ranks that a layer's matrix is split over.

    Transformer Engine's own attribute is None in experts, whose messages are the dispatcher's; Megatron
    keeps the group beside it.
    """
    return layer._tp_group if hasattr(layer, "_tp_group") else layer.tp_group


class Factors(torch.nn.Module):
    """A and B of one matrix: this rank's part, in fp32 whatever the model is turned to."""

    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter

    def __init__(self, target: Target, layer: Any, whole: tuple[Tensor, Tensor]) -> None:
        """For a matrix of `layer`, from whole factors."""
        super().__init__()
        self.target = target
        group, expert = group_of(layer), target.weight.of_expert
        rank, size = group.rank(), group.size()
        row = target.weight.layout == "columns" or target.is_embedding
        # Which of the two is split, and along which of its dimensions.
        self.axes: tuple[int | None, int | None] = (1, None) if row else (None, 0)
        sequence_parallel = layer.config.sequence_parallel and not expert
        for name, value, axis in zip(("lora_a", "lora_b"), whole, self.axes, strict=True):
            if axis is not None:
                value = _part(value, axis, layer, target, rank, size)
            parameter = torch.nn.Parameter(value.to(layer.weight.device, copy=True))
            attributes: Any = parameter
            attributes.allreduce = getattr(layer.weight, "allreduce", True)
            if axis is not None:
                # Counted in the gradient norm on every rank; the others on the first of their group.
                tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            elif target.parameter != "output_layer.weight":
                # Each rank sees its part of the sequence (the output layer all of it).
                attributes.sequence_parallel = sequence_parallel
            self.register_parameter(name, parameter)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Both. Called, since Megatron's hooks on calls wait for parameters (`--overlap-param-gather`)."""
        return self.lora_a, self.lora_b

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Moved with the model, but not rounded with it.
        return super()._apply(lambda t: t.to(device=fn(t).device), recurse)


def _part(value: Tensor, axis: int, layer: Any, target: Target, rank: int, size: int) -> Tensor:
    """This rank's part of a whole factor; a padded vocabulary is filled up with zeros."""
    if target.weight.layout == "vocabulary":
        rows = layer.weight.shape[0] * size
        padding = [0, 0, 0, 0]
        padding[3 - 2 * axis] = rows - value.shape[axis]
        value = functional.pad(value, padding)
    return value.chunk(size, dim=axis)[rank]


class Adapter(torch.nn.Module):
    """All factors beside one layer of Megatron; `add` is its forward hook."""

    def __init__(self, layer: Any, factors: list[Factors], dropout: float) -> None:
        """Beside `layer`, of at least one of the matrices that it is made of."""
        super().__init__()
        self.factors = torch.nn.ModuleList(factors)
        self.dropout = dropout
        self.weight = factors[0].target.weight
        size = group_of(layer).size()
        self.groups = self.weight.groups // size
        self.rows = [shape[0] // size for shape in self.weight.tensors.values()]
        # Before the hook that multiplies a family's logits (`model/residual.py`): these are part of them.
        self.hook = layer.register_forward_hook(self.add, prepend=True)

    def __iter__(self) -> Iterator[Factors]:
        """The factors of each matrix."""
        return iter(cast("Iterable[Factors]", self.factors))

    def add(self, layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        """What the layer gives, and what the factors add to it."""
        if isinstance(output, Tensor):  # the embedding
            return output + self._embedded(layer, inputs[0]).to(output.dtype)
        out, bias = output
        changed = self._row if self.weight.layout == "columns" else self._column
        return out + changed(layer, inputs[0]), bias

    def _low(self, x: Tensor, a: Tensor, *, split: bool) -> Tensor:
        """A x; `split`: other ranks of the tensor parallel group have other parts of x."""
        if self.dropout and self.training:
            if split or self.weight.of_expert:
                # Elsewhere ranks see the same, and draw the same.
                expert = (get_expert_parallel_rng_tracker_name(),) if self.weight.of_expert else ()
                with tensor_parallel.get_cuda_rng_tracker().fork(*expert):
                    x = functional.dropout(x, self.dropout)
            else:
                x = functional.dropout(x, self.dropout)
        return functional.linear(x, a.to(x.dtype))

    def _column(self, layer: Any, x: Tensor) -> Tensor:
        group, dispatched = group_of(layer), self.weight.of_expert
        gathers = layer.sequence_parallel and not dispatched
        low, second = [], []
        for each in self:
            a, b = each()
            second.append(b)
            if dispatched:
                a = mappings.copy_to_tensor_model_parallel_region(a, group=group)
            low.append(self._low(x, a, split=gathers) * each.target.scaling)
        ranks = [part.shape[-1] for part in low]
        h = torch.cat(low, dim=-1)
        if gathers:
            h = mappings.gather_from_sequence_parallel_region(h, group=group)
        elif not dispatched:
            h = mappings.copy_to_tensor_model_parallel_region(h, group=group)
        high = zip(self, second, h.split(ranks, dim=-1), strict=True)
        return self._joined(
            {each.target.part: functional.linear(part, b.to(x.dtype)) for each, b, part in high}
        )

    def _joined(self, parts: dict[int, Tensor]) -> Tensor:
        """Changes of a fused layer's matrices, in its own order of rows: [..., rows of this rank]."""
        some = next(iter(parts.values()))
        full = [
            parts[n] if n in parts else some.new_zeros(*some.shape[:-1], rows)
            for n, rows in enumerate(self.rows)
        ]
        if self.weight.layout != "qkv":
            return full[0] if len(full) == 1 else torch.cat(full, dim=-1)
        by_group = [part.unflatten(-1, (self.groups, -1)) for part in full]
        return torch.cat(by_group, dim=-1).flatten(-2)

    def _row(self, layer: Any, x: Tensor) -> Tensor:
        (each,) = self
        a, b = each()
        h = self._low(x, a, split=True) * each.target.scaling
        group = group_of(layer)
        if self.weight.of_expert:
            b = mappings.copy_to_tensor_model_parallel_region(b, group=group)
        elif layer.sequence_parallel:
            h = mappings.reduce_scatter_to_sequence_parallel_region(h, group=group)
        else:
            h = mappings.reduce_from_tensor_model_parallel_region(h, group=group)
        return functional.linear(h, b.to(x.dtype))

    def _embedded(self, layer: Any, ids: Tensor) -> Tensor:
        (each,) = self
        a, b = each()
        local = ids - layer.vocab_start_index
        held = (local >= 0) & (local < a.shape[1])
        h = functional.embedding(local.clamp(0, a.shape[1] - 1), a.t())
        h = h * held.unsqueeze(-1) * each.target.scaling
        if layer.reduce_scatter_embeddings:
            h = h.transpose(0, 1).contiguous()
            h = mappings.reduce_scatter_to_sequence_parallel_region(h, group=group_of(layer))
        else:
            h = mappings.reduce_from_tensor_model_parallel_region(h, group=group_of(layer))
        return functional.linear(h, b)

    @torch.no_grad()
    def merge(self, layer: Any, *, rounded: bool) -> None:
        """Add the product of the factors to the weight of a layer that is not split.

        Args:
            layer: that the factors are of.
            rounded: the sum is turned to what the weight was of; else it stays in fp32.
        """
        products = {
            each.target.part: (each.lora_b @ each.lora_a * each.target.scaling).t() for each in self
        }
        change = self._joined(products)  # its rows are the last dimension here
        if not isinstance(layer, tensor_parallel.VocabParallelEmbedding):
            change = change.t()
        total = layer.weight.float() + change
        layer.weight.data = total.to(layer.weight.dtype) if rounded else total


def new_factors(target: Target, seed: int) -> tuple[Tensor, Tensor]:
    """Whole factors as PEFT begins them, from the matrix's name alone: their product is 0."""
    digest = hashlib.sha256(f"{seed} {target.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    a, b = (torch.zeros(shape) for shape in target.shapes)
    if target.is_embedding:
        b.normal_(generator=generator)
    else:
        bound = a.shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)
        a.uniform_(-bound, bound, generator=generator)
    return a, b


def add_adapters(
    chunk: Any,
    targets: dict[str, Target],
    *,
    dropout: float = 0.0,
    seed: int = 0,
    folder: str | None = None,
) -> None:
    """Freeze a model chunk, its weights loaded, and put factors beside its layers.

    Args:
        chunk: an unwrapped `GPTModel`.
        targets: of the whole model.
        dropout: of what A reads, in training.
        seed: of new factors.
        folder: an adapter of PEFT to begin with instead.
    """
    by_parameter: dict[str, list[Target]] = {}
    for target in targets.values():
        by_parameter.setdefault(target.parameter, []).append(target)
    layers = {
        name.rpartition(".")[0]: by_parameter[whole]
        for name, whole, _ in named_parameters(chunk)
        if whole in by_parameter
    }
    for parameter in chunk.parameters():
        parameter.requires_grad_(False)
    for name, own in layers.items():
        layer = chunk.get_submodule(name)
        factors = [
            Factors(t, layer, read_factors(folder, t) if folder else new_factors(t, seed))
            for t in sorted(own, key=lambda t: t.part)
        ]
        layer.add_module(NAME, Adapter(layer, factors, dropout))
    if chunk.pre_process:
        # Recomputation drops the gradients of what lies in a part whose input needs none, and a stage
        # without factors must hand on gradients.
        chunk.embedding.register_forward_hook(_begin_gradients)
    chunk.sharded_state_dict = types.MethodType(_sharded_state_dict, chunk)
    save_factors_only(chunk)


def _begin_gradients(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def adapters(chunk: torch.nn.Module) -> Iterator[tuple[Any, Adapter]]:
    """Layers with factors, and these."""
    for module in chunk.modules():
        adapter = getattr(module, NAME, None)
        if isinstance(adapter, Adapter):
            yield module, adapter


def factors_of(chunk: torch.nn.Module) -> dict[str, Tensor]:
    """Factors of a whole model (tensor and pipeline parallel size 1), under PEFT's names."""
    found = {}
    for _, adapter in adapters(chunk):
        for each in adapter:
            for key, value, shape in zip(
                each.target.keys, (each.lora_a, each.lora_b), each.target.shapes, strict=True
            ):
                # Without the padding of the vocabulary.
                found[key] = value.detach()[: shape[0], : shape[1]]
    return found


def merge_adapters(chunk: torch.nn.Module, *, rounded: bool = True) -> None:
    """Turn a whole model with factors into one without that computes the same (`Adapter.merge`)."""
    for layer, adapter in list(adapters(chunk)):
        adapter.merge(layer, rounded=rounded)
        adapter.hook.remove()
        delattr(layer, NAME)


def _sharded_state_dict(
    chunk: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
) -> dict[str, ShardedTensor]:
    """What a checkpoint holds: factors only, by PEFT's names, each whole matrix one tensor."""
    state = {}
    names = {module: name for name, module in chunk.named_modules()}
    for layer, adapter in adapters(chunk):
        group = group_of(layer)
        if adapter.weight.of_expert:
            copy = parallel_state.get_expert_data_parallel_rank()
        else:
            copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        for each in adapter:
            for name, key, axis in zip(
                ("lora_a", "lora_b"), each.target.keys, each.axes, strict=True
            ):
                cut = [] if axis is None else [(axis, group.rank(), group.size())]
                replica = (0, group.rank() if axis is None else 0, copy)
                state[f"{prefix}{names[each]}.{name}"] = ShardedTensor.from_rank_offsets(
                    f"{NAME}.{key}", getattr(each, name), *cut, replica_id=replica
                )
    return state


def save_factors_only(model: torch.nn.Module) -> None:
    """Leave the base out of a model's state; it is read from its own files."""

    def leave_out(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [n for n in state if n.startswith(prefix) and ".lora_" not in n]:
            del state[name]

    def excuse(module: Any, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if ".lora_" in name]

    model.register_state_dict_post_hook(leave_out)
    model.register_load_state_dict_post_hook(excuse)
