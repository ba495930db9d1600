"""EAGLE-3 drafts on packed documents: ModelOpt builds the module and keeps its state, the forward is here.

    query q    reads the embedding of token q + 1 + t and, normed apart, what step t - 1 made of q (step 0:
               the features, `fc` of the base's auxiliary hidden states at q); its position is q + t
    predicts   token q + 2 + t, as the base model does at q + 1 + t
    loss       KL(base || draft) where the answer mask trains token q + 2 + t, if q is in its document

So the steps of training are those of a server that drafts (`draft_attention`). No step is detached from the
one before, which ModelOpt's own forward does.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from post_training.batch.packed_documents import PackedDocuments
from post_training.batch.trained_tokens import TrainedTokens
from post_training.distillation.draft_attention import step_attention
from post_training.distillation.losses import divergence
from post_training.hf.draft import DraftShape
from post_training.hf.weights import read_parameter
from post_training.metrics.step_counters import counters
from post_training.model.attention import PackedAttention
from post_training.model.norm import LocalNorm
from post_training.platform.modelopt_eagle import built_from
from post_training.training.loss import hide_vocabulary_padding


@dataclass(frozen=True)
class DraftSettings:
    """What a draft is trained as."""

    aux_layers: tuple[int, ...]
    """Of which layers of the base it reads the output, ascending; -1 is that of the embedding."""
    vocabulary: int
    """Tokens of the base's vocabulary."""
    steps: int = 4
    """Test-time steps."""
    decay: float = 0.9
    """Step t weighs `decay ** t`."""
    detach: bool = False
    """Stop the gradient between steps, as ModelOpt's forward does."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> DraftSettings:
        """Those of a run with `--draft`."""
        return cls(
            tuple(args.aux_layers),
            args.vocab_size,
            args.draft_ttt_steps,
            args.draft_loss_decay,
            args.draft_detach_steps,
        )


def layer_spec(config: Any) -> TransformerBlockSubmodules:
    """Spec of a draft's decoder: the same local layers on every machine."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = LocalNorm
    parts.self_attention.submodules.core_attention = PackedAttention
    return TransformerBlockSubmodules(layer_specs=[layer], layer_norm=LocalNorm)


@contextmanager
def own_layers() -> Iterator[None]:
    """Around whatever makes ModelOpt build a draft: `add_draft`, and restoring its state."""
    with built_from(LocalNorm, layer_spec):
        yield


def modelopt_config(
    model: GPTModel, shape: DraftShape, settings: DraftSettings, *, cut: bool
) -> dict[str, Any]:
    """What ModelOpt is told, and a checkpoint keeps; `cut`: the draft's vocabulary is not the base's."""
    config = model.config
    return {
        "eagle_ttt_steps": settings.steps,
        "eagle_loss_decay_factor": settings.decay,
        # Its offline mode turns sequence parallelism off for the whole model; the forward here needs none.
        "eagle_offline": False,
        "eagle_export_rope_scaling": {},
        "eagle_architecture_config": {
            "torch_dtype": str(config.params_dtype).removeprefix("torch."),
            "num_hidden_layers": 1,
            "intermediate_size": shape.intermediate_size,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_value_heads,
            "head_dim": shape.head_dim,
            "rms_norm_eps": config.layernorm_epsilon,
            "initializer_range": config.init_method_std,
            "rope_theta": shape.rope_theta,
            "use_aux_hidden_state": True,
            "use_last_layernorm": True,
            "has_lm_head": True,
            "eagle_aux_hidden_state_layer_ids": list(settings.aux_layers),
            **({"draft_vocab_size": shape.vocabulary} if cut else {}),
        },
    }


def add_draft(
    model: GPTModel,
    shape: DraftShape,
    settings: DraftSettings,
    *,
    tokens: Tensor | None = None,
    seed: int = 0,
) -> None:
    """Give a base model, its weights loaded, an untrained draft; the base is frozen.

    The draft's weights are the same on every layout: normal, of the base's standard deviation, and its
    output layer begins as the base's own.

    Args:
        model: unwrapped.
        shape: of the draft.
        settings: what it is trained as.
        tokens: those that the draft can write, ascending: int64 [draft vocabulary]; None: all.
        seed: of its weights.
    """
    import modelopt.torch.speculative as mtsp

    config = modelopt_config(model, shape, settings, cut=tokens is not None)
    with own_layers():
        mtsp.convert(model, [("eagle", config)])
    equip(model, settings)
    module: Any = model.eagle_module
    if tokens is not None:
        module.d2t.copy_(tokens - torch.arange(len(tokens)))
    std = float(model.config.init_method_std)
    group = module.eagle_output_layer.tp_group
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(shape.weights().items()):
            parameter = module.get_parameter(name)
            if name == "eagle_output_layer.weight":
                parameter.copy_(teacher_rows(model))
                continue
            whole = {
                served: torch.ones(size)
                if len(size) == 1
                else torch.empty(size).normal_(0.0, std, generator=generator)
                for served, size in weight.tensors.items()
            }
            parameter.copy_(
                read_parameter(_Whole(whole), weight, parameter.shape, group.rank(), group.size())
            )


class _Whole:
    """Tensors in memory, read as those of a HuggingFace folder are."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def slice(self, name: str) -> Any:
        return _Slice(self.tensors[name])


class _Slice:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor[index]


def equip(model: GPTModel, settings: DraftSettings) -> None:
    """Let a model that ModelOpt has converted, now or in a checkpoint, run the forward of this file."""
    for layer in model.decoder.layers:  # what collects states for ModelOpt's own forward
        for key, hook in list(layer._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "_transformer_layer_forward_hook":
                del layer._forward_hooks[key]
    model.draft = DraftForward(settings)
    model.forward = types.MethodType(draft_forward, model)


@torch.no_grad()
def teacher_rows(model: GPTModel) -> Tensor:
    """Rows of the base's output layer for this rank's part of the draft's vocabulary: [rows, hidden]."""
    own: Tensor = (
        model.shared_embedding_or_output_weight()
        if model.share_embeddings_and_output_weights
        else model.output_layer.weight
    )
    offsets = getattr(model.eagle_module, "d2t", None)
    if offsets is None:
        return own.detach()
    layer = model.output_layer
    group = layer.tp_group
    tokens = offsets + torch.arange(len(offsets), device=offsets.device)
    rows = model.eagle_module.eagle_output_layer.weight.shape[0]
    # Every rank gives what it holds of all wanted rows, and keeps its own part of the sum.
    local = tokens - group.rank() * own.shape[0]
    held = (local >= 0) & (local < own.shape[0])
    wanted = own.detach()[local.clamp(0, own.shape[0] - 1)] * held.unsqueeze(1)
    if group.size() > 1:
        torch.distributed.all_reduce(wanted, group=group)
    return wanted[group.rank() * rows : (group.rank() + 1) * rows].clone()


@dataclass(frozen=True)
class BaseStates:
    """What a draft reads of its base model, of one row of tokens."""

    aux_hidden_states: Tensor
    """Outputs of the auxiliary layers side by side, of this rank's tokens under sequence parallelism:
    [tokens, 1, 3 * hidden]."""
    hidden_states: Tensor
    """After the final norm, of all tokens of the row: [tokens, 1, hidden]."""


def base_states(model: GPTModel, layers: Sequence[int], *inputs: Any, **options: Any) -> BaseStates:
    """Run a frozen base model and keep what a draft reads of it.

    Args:
        model: the whole of it, with or without a draft.
        layers: the auxiliary ones, ascending; -1 is the embedding.
        inputs: as `GPTModel.forward` takes them.
        options: likewise.
    """
    seen: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            seen[number] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    modules = [
        (number, model.embedding if number < 0 else model.decoder.layers[number])
        for number in layers
    ]
    handles = [module.register_forward_hook(keep(number)) for number, module in modules]
    for part in (model.embedding, model.decoder):
        part.eval()
    try:
        with torch.no_grad():
            final: Tensor = GPTModel.forward(
                model,
                *inputs,
                **options,
                output_processor=lambda *, hidden_states, **_: hidden_states,
            )
    finally:
        for handle in handles:
            handle.remove()
    if model.config.sequence_parallel:
        final = tensor_parallel.gather_from_sequence_parallel_region(final)
    return BaseStates(torch.cat([seen[number] for number in layers], dim=-1), final)


class DraftForward:
    """The losses of one draft over a micro batch."""

    def __init__(self, settings: DraftSettings) -> None:
        self.settings = settings
        self._teacher: Tensor | None = None

    def losses(
        self,
        model: GPTModel,
        tokens: Tensor,
        packed: PackedDocuments,
        trained: TrainedTokens,
        states: BaseStates,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All test-time steps of a row.

        Args:
            model: unwrapped.
            tokens: int64 [1, tokens].
            packed: the documents of the row.
            trained: positions whose next token is trained.
            states: of the base model.

        Returns:
            KL, float32 [steps, trained]; which of them count, 0 or 1, the same shape; and which drafts are
            what the base model would write, likewise.
        """
        module: Any = model.eagle_module
        lengths, positions = packed.query_lengths, packed.position_ids
        assert lengths is not None and positions is not None
        if self._teacher is None:
            self._teacher = teacher_rows(model)
        teacher, greedy = self._teacher_logits(model, states.hidden_states, trained)
        hidden, _ = module.fc(states.aux_hidden_states)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        losses, counted, right = [], [], []
        place = positions.index_select(0, trained.indices)
        for step in range(self.settings.steps):
            if step and self.settings.detach:
                hidden = hidden.detach()
            ids = tokens.roll(-(1 + step), dims=1)
            hidden = self._layer(model, hidden, ids, packed, step, keys, values)
            # The query that predicts the label of `r` at this step is `1 + step` tokens before `r`.
            queries = (trained.indices - (1 + step)).clamp(min=0)
            logits = self._logits(model, hidden, queries)
            losses.append(divergence(logits, teacher, module.eagle_output_layer.tp_group))
            counted.append(trained.weights * (place > step))
            right.append(self._right(module, logits.detach(), greedy) * counted[-1])
        return torch.stack(losses), torch.stack(counted), torch.stack(right)

    def _layer(
        self,
        model: GPTModel,
        hidden: Tensor,
        ids: Tensor,
        packed: PackedDocuments,
        step: int,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        """The draft's layer at one step: [tokens of this rank, 1, hidden], before the final norm."""
        module: Any = model.eagle_module
        layer = module.decoder.layers[0]
        attention = layer.self_attention
        with torch.no_grad():
            embedded = model.embedding(input_ids=ids, position_ids=None)
        read = torch.cat([module.enorm(embedded), layer.input_layernorm(hidden)], dim=-1)
        query, key, value = attention.get_query_key_value_tensors(read)
        angles = self._angles(model, packed, step)
        query, key = _rotated(query, angles), _rotated(key, angles)
        keys.append(key)
        values.append(value)
        if step == 0:
            mixed = attention.core_attention(query, key, value, None, packed_seq_params=packed)
        else:
            assert packed.query_lengths is not None
            mixed = step_attention(query, keys, values, packed.query_lengths)
        hidden = hidden + attention.linear_proj(mixed)[0]
        return hidden + layer.mlp(layer.pre_mlp_layernorm(hidden))[0]

    def _angles(self, model: GPTModel, packed: PackedDocuments, step: int) -> Tensor:
        """float32 [tokens, 1, 1, head_dim]: those of the base model, of positions `step` further on."""
        assert packed.position_ids is not None
        frequencies = model.rotary_pos_emb.original.inv_freq.to(packed.position_ids.device)
        angles = torch.outer((packed.position_ids + step).float(), frequencies)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]

    def _logits(self, model: GPTModel, hidden: Tensor, queries: Tensor) -> Tensor:
        """Draft's logits of some tokens of the row: [queries, draft vocabulary of this rank]."""
        module: Any = model.eagle_module
        layer = module.eagle_output_layer
        normed = module.decoder.final_layernorm(hidden)
        parallel = layer.sequence_parallel
        if parallel:
            normed = tensor_parallel.gather_from_sequence_parallel_region(
                normed, tensor_parallel_output_grad=False, group=layer.tp_group
            )
        previous = layer.allreduce_dgrad
        layer.sequence_parallel, layer.allreduce_dgrad = False, previous or parallel
        try:
            logits: Tensor = layer(normed.index_select(0, queries))[0]
        finally:
            layer.sequence_parallel, layer.allreduce_dgrad = parallel, previous
        return self._hide_padding(model, logits.squeeze(1).float())

    def _hide_padding(self, model: GPTModel, logits: Tensor) -> Tensor:
        offsets = getattr(model.eagle_module, "d2t", None)
        real = self.settings.vocabulary if offsets is None else len(offsets)
        rank = model.eagle_module.eagle_output_layer.tp_group.rank()
        return hide_vocabulary_padding(logits, real, rank)

    @torch.no_grad()
    def _teacher_logits(
        self, model: GPTModel, hidden: Tensor, trained: TrainedTokens
    ) -> tuple[Tensor, Tensor]:
        """The base model's logits over the draft's vocabulary, and its own choice of token.

        Returns:
            float32 [trained, draft vocabulary of this rank]; tokens, int64 [trained].
        """
        assert self._teacher is not None
        chosen = hidden.index_select(0, trained.indices).squeeze(1)
        logits = self._hide_padding(model, (chosen @ self._teacher.t()).float())
        group = model.output_layer.tp_group
        if not hasattr(model.eagle_module, "d2t"):
            return logits, largest_over_ranks(logits, group)
        own = (
            model.shared_embedding_or_output_weight()
            if model.share_embeddings_and_output_weights
            else model.output_layer.weight
        )
        whole = hide_vocabulary_padding(
            (chosen @ own.t()).float(), self.settings.vocabulary, group.rank()
        )
        return logits, largest_over_ranks(whole, group)

    @torch.no_grad()
    def _right(self, module: Any, logits: Tensor, greedy: Tensor) -> Tensor:
        """1 where the draft's first choice is the base's, else 0: float32 [trained]."""
        choice = largest_over_ranks(logits, module.eagle_output_layer.tp_group)
        if hasattr(module, "d2t"):
            choice = choice + module.d2t[choice]
        return (choice == greedy).float()


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate halves against each other (as in Llama): [tokens, 1, heads, head_dim]."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * angles.cos() + turned * angles.sin()).to(x.dtype)


@torch.no_grad()
def largest_over_ranks(logits: Tensor, group: Any) -> Tensor:
    """The most probable token of a vocabulary that ranks share, the first of equals: int64 [tokens].

    Args:
        logits: float32 [tokens, vocabulary rows of this rank].
        group: the tensor parallel group.
    """
    largest, tokens = logits.max(dim=-1)
    tokens = tokens + group.rank() * logits.shape[-1]
    if group.size() == 1:
        return tokens
    own = torch.stack([largest.double(), tokens.double()])
    every = own.new_empty(group.size() * 2, own.shape[1])
    torch.distributed.all_gather_into_tensor(every, own, group=group)
    every = every.view(group.size(), 2, -1)
    winner = every[:, 0].max(dim=0, keepdim=True).indices
    return every[:, 1].gather(0, winner).squeeze(0).long()


def draft_forward(
    model: Any,
    tokens: Tensor,
    position_ids: Tensor,
    attention_mask: None = None,
    *,
    packed_seq_params: PackedDocuments,
    trained: TrainedTokens,
    aux_hidden_states: Tensor | None = None,
    hidden_states: Tensor | None = None,
) -> Tensor:
    """What `model(...)` of a model with a draft computes: the loss of each trained token, over all steps.

    Args:
        model: the unwrapped model.
        tokens: int64 [1, tokens].
        position_ids: int64 [1, tokens].
        attention_mask: None: documents are all there is.
        packed_seq_params: the documents of the row.
        trained: positions whose next token is trained.
        aux_hidden_states: stored ones of the whole row, [tokens, 1, 3 * hidden]; None: the base
            computes them.
        hidden_states: likewise, [tokens, 1, hidden].

    Returns:
        float32 [trained]. Losses and accuracy of each step are counted apart (`part_names`).
    """
    draft: DraftForward = model.draft
    if aux_hidden_states is None or hidden_states is None:
        states = base_states(
            model,
            draft.settings.aux_layers,
            *(tokens, position_ids, None),
            packed_seq_params=packed_seq_params,
        )
    else:
        dtype = model.eagle_module.fc.weight.dtype
        aux, final = aux_hidden_states.to(dtype), hidden_states.to(dtype)
        if model.config.sequence_parallel:
            aux = tensor_parallel.scatter_to_sequence_parallel_region(aux)
        states = BaseStates(aux, final)
    losses, counted, right = draft.losses(model, tokens, packed_seq_params, trained, states)
    sums = torch.cat([(losses.detach() * counted).sum(1), right.sum(1)])
    counters.add_parts(sums, counted.sum(1).repeat(2))
    decay = draft.settings.decay ** torch.arange(len(losses), device=losses.device).unsqueeze(1)
    total: Tensor = (losses * counted * decay).sum(0)
    return total


def part_names(steps: int) -> list[str]:
    """What `draft_forward` counts apart, by the number of the drafted token."""
    return [f"draft_{what}_{step + 1}" for what in ("loss", "accuracy") for step in range(steps)]
