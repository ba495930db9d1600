"""Building a draft: ModelOpt makes the module and keeps its state; it begins the same on every layout."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from post_training.hf.draft import DraftShape
from post_training.hf.weights import read_parameter
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


# Around whatever makes ModelOpt build a draft: `add_draft`, and restoring its state.
own_layers = functools.partial(built_from, LocalNorm, layer_spec)


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
            source: Any = SimpleNamespace(slice=whole.__getitem__)
            parameter.copy_(
                read_parameter(source, weight, parameter.shape, group.rank(), group.size())
            )


def output_rows(model: GPTModel) -> Tensor:
    """This rank's rows of the base's output layer, which may be its embedding: [rows, hidden]."""
    rows: Tensor = (
        model.shared_embedding_or_output_weight()
        if model.share_embeddings_and_output_weights
        else model.output_layer.weight
    )
    return rows.detach()


def base_logits(model: GPTModel, hidden: Tensor, vocabulary: int) -> Iterator[Tensor]:
    """The base's logits of 1,024 tokens at a time, without gradient, padded rows hidden.

    Args:
        model: unwrapped.
        hidden: after the final norm: [tokens, hidden].
        vocabulary: tokens there really are.

    Yields:
        float32 [some tokens, vocabulary rows of this rank].
    """
    for part in hidden.detach().split(1024):
        logits = (part @ output_rows(model).t()).float()
        yield hide_vocabulary_padding(logits, vocabulary, model.output_layer.tp_group.rank())


def draft_tokens_of(module: Any, vocabulary: int = 0) -> Tensor:
    """The base's token of each row of a draft's output layer: int64; of `vocabulary` where it is whole."""
    offsets = getattr(module, "d2t", None)
    if offsets is None:
        return torch.arange(vocabulary)
    return offsets + torch.arange(len(offsets), device=offsets.device)


@torch.no_grad()
def teacher_rows(model: GPTModel) -> Tensor:
    """Rows of the base's output layer for this rank's part of the draft's vocabulary: [rows, hidden]."""
    own = output_rows(model)
    if getattr(model.eagle_module, "d2t", None) is None:
        return own
    layer = model.output_layer
    group = layer.tp_group
    tokens = draft_tokens_of(model.eagle_module)
    rows = model.eagle_module.eagle_output_layer.weight.shape[0]
    # Every rank gives what it holds of all wanted rows, and keeps its own part of the sum.
    local = tokens - group.rank() * own.shape[0]
    held = (local >= 0) & (local < own.shape[0])
    wanted = own[local.clamp(0, own.shape[0] - 1)] * held.unsqueeze(1)
    if group.size() > 1:
        torch.distributed.all_reduce(wanted, group=group)
    return wanted[group.rank() * rows : (group.rank() + 1) * rows].clone()
