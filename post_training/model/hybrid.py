"""Megatron's `HybridModel` of local layers, with losses of trained tokens only."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.argument_utils import hybrid_config_from_args
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig
from torch import Tensor

from post_training.model.attention import PackedAttention
from post_training.model.mamba import PackedMixer
from post_training.model.norm import LocalNorm
from post_training.model.router import DocumentRouter
from post_training.tensors.hybrid import StateSpace


class LocalStack(HybridStack):
    """Megatron's stack, whose last norm is always Transformer Engine's, with the local one."""

    def __init__(self, *args: Any, post_process: bool = True, **options: Any) -> None:
        """Take its arguments."""
        super().__init__(*args, post_process=post_process, post_layer_norm=False, **options)
        self.post_layer_norm = True
        if post_process:
            self.final_norm = LocalNorm(
                self.config, self.config.hidden_size, eps=self.config.layernorm_epsilon
            )


class PackedHybridModel(HybridModel):
    """Takes an `output_processor`, as `GPTModel` does."""

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        labels: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        output_processor: Callable[..., Tensor] | None = None,
        output_processor_context: Any = None,
    ) -> Tensor:
        """Compute this stage.

        Args:
            input_ids: [rows, tokens].
            position_ids: like `input_ids`.
            attention_mask: not used.
            labels: like `input_ids`, for `output_processor`.
            inference_context: holds keys, values and states while text is generated.
            packed_seq_params: the documents of a single row.
            output_processor: makes the output of hidden states; None: logits, [rows, tokens, vocabulary].
            output_processor_context: what it is told beside.
        """
        hidden = self.embedding(input_ids, position_ids) if self.pre_process else None
        hidden = self.decoder(
            hidden,
            attention_mask,
            inference_context=inference_context,
            packed_seq_params=packed_seq_params,
        )
        if not self.post_process:
            return hidden
        hidden = hidden.to(self.config.params_dtype)  # of a residual stream in fp32
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        if output_processor is not None:
            return output_processor(
                hidden_states=hidden,
                output_layer=self.output_layer,
                output_weight=weight,
                labels=labels,
                context=output_processor_context,
                compute_language_model_loss=self.compute_language_model_loss,
            )
        logits: Tensor = self.output_layer(hidden, weight=weight)[0]
        return logits.transpose(0, 1).contiguous()


class PackedHybridBuilder(HybridModelBuilder):
    """Builds `PackedHybridModel`."""

    def build_model(self, *args: Any, **options: Any) -> HybridModel:
        """Build one stage, as Megatron does, which names its own class."""
        model = super().build_model(*args, **options)
        model.__class__ = PackedHybridModel
        return model


@dataclasses.dataclass(kw_only=True)
class PackedHybridConfig(HybridModelConfig):
    """What it is built from."""

    builder: ClassVar[str] = f"{__name__}.PackedHybridBuilder"


def hybrid_config(args: argparse.Namespace) -> Any:
    """The configuration of a model with state-space layers, as `gpt_config_from_args` of others."""
    config = hybrid_config_from_args(args, model_config_cls=PackedHybridConfig)
    if getattr(args.hf_config, "residual_in_fp32", False):
        config.transformer.fp32_residual_connection = True
        if config.transformer.pipeline_dtype is not None:
            config.transformer.pipeline_dtype = torch.float32
    config.hybrid_stack_spec = stack_spec(StateSpace.of(args.hf_config), args.num_experts)
    return config


def stack_spec(space: StateSpace, num_experts: int | None) -> ModuleSpec:
    """The kinds of layers that there may be."""
    mixer = ModuleSpec(
        module=PackedMixer,
        params={"space": space},
        submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
    )
    mamba = MambaLayerSubmodules(norm=LocalNorm, mixer=mixer, mamba_bda=get_bias_dropout_add)
    dense = get_gpt_layer_local_submodules(normalization="RMSNorm")
    without_attention = {"input_layernorm": IdentityOp, "self_attention": IdentityOp}
    without_attention |= {"self_attn_bda": IdentityFuncOp, "pre_mlp_layernorm": LocalNorm}
    attention = dataclasses.replace(
        dense,
        input_layernorm=LocalNorm,
        pre_mlp_layernorm=IdentityOp,
        mlp=IdentityOp,
        mlp_bda=IdentityFuncOp,
    )
    attention.self_attention.submodules.core_attention = PackedAttention
    stack = HybridStackSubmodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(
            module=MLPLayer, submodules=dataclasses.replace(dense, **without_attention)
        ),
    )
    if num_experts:
        routed = get_gpt_layer_local_submodules(num_experts=num_experts, normalization="RMSNorm")
        experts = dataclasses.replace(routed.mlp.keywords["submodules"], router=DocumentRouter)
        routed = dataclasses.replace(
            routed, **without_attention, mlp=functools.partial(MoELayer, submodules=experts)
        )
        stack.moe_layer = ModuleSpec(module=MLPLayer, submodules=routed)
    return ModuleSpec(module=LocalStack, submodules=stack)
