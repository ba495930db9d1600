"""The draft of a speculative decoder (EAGLE-3) as servers read it: what it is made of, under which names.

Names and keys are those that vLLM, SGLang and TensorRT-LLM load (`LlamaForCausalLMEagle3`): one Llama
layer whose queries, keys and values read the next token's embedding beside the features, an input layer
that makes the features of the base model's auxiliary hidden states, and an output layer of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from post_training.errors import SetupError
from post_training.hf.families import head_dim
from post_training.hf.rotary import rope_parameters
from post_training.tensors.weight import Weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Of the servers' Llama code, so that frequencies do not depend on the length of a document.
ROPE_TYPES = ("default", "linear", "llama3")
AUX_LAYERS = 3
"""Auxiliary hidden states that a draft reads: servers make its input layer for so many."""


@dataclass(frozen=True)
class DraftShape:
    """The sizes of a draft; but for the vocabulary those of its base model."""

    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    head_dim: int
    rope_theta: float
    vocabulary: int
    """Tokens that it can draft."""

    @classmethod
    def of(cls, config: PretrainedConfig, vocabulary: int | None = None) -> DraftShape:
        """That of a base model's draft; `vocabulary`: of the draft, None for the base's whole one.

        Raises:
            SetupError: the format cannot carry a draft with the base's rotary or token embedding.
        """
        rotary = rope_parameters(config)
        rope = rotary.get("rope_type", "default")
        if rope not in ROPE_TYPES:
            raise SetupError(
                f"a draft cannot have rope type {rope} of its base model: servers read "
                f"{', '.join(ROPE_TYPES)}"
            )
        if rotary.get("partial_rotary_factor", 1.0) != 1.0 or hasattr(
            config, "embedding_multiplier"
        ):
            raise SetupError(
                f"a draft cannot stand beside a {config.architectures[0]}: servers turn all of its heads "
                f"and give it embeddings as they are stored"
            )
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim(config),
            float(rotary["rope_theta"]),
            vocabulary or config.vocab_size,
        )

    def weights(self) -> dict[str, Weight]:
        """Every parameter of ModelOpt's `EagleModule`, by its name there."""
        hidden, attention = self.hidden_size, self.heads * self.head_dim
        keys = self.key_value_heads * self.head_dim
        norm = {
            "enorm": "midlayer.input_layernorm",
            "decoder.layers.0.input_layernorm": "midlayer.hidden_norm",
            "decoder.layers.0.pre_mlp_layernorm": "midlayer.post_attention_layernorm",
            "decoder.final_layernorm": "norm",
        }
        layer, own = "decoder.layers.0", "midlayer"
        return {
            **{
                f"{name}.weight": Weight("replicated", {f"{served}.weight": (hidden,)})
                for name, served in norm.items()
            },
            "fc.weight": Weight("replicated", {"fc.weight": (hidden, AUX_LAYERS * hidden)}),
            f"{layer}.self_attention.linear_qkv.weight": Weight(
                "qkv",
                {
                    f"{own}.self_attn.q_proj.weight": (attention, 2 * hidden),
                    f"{own}.self_attn.k_proj.weight": (keys, 2 * hidden),
                    f"{own}.self_attn.v_proj.weight": (keys, 2 * hidden),
                },
                self.key_value_heads,
            ),
            f"{layer}.self_attention.linear_proj.weight": Weight(
                "columns", {f"{own}.self_attn.o_proj.weight": (hidden, attention)}
            ),
            f"{layer}.mlp.linear_fc1.weight": Weight(
                "gate_up",
                {
                    f"{own}.mlp.gate_proj.weight": (self.intermediate_size, hidden),
                    f"{own}.mlp.up_proj.weight": (self.intermediate_size, hidden),
                },
            ),
            f"{layer}.mlp.linear_fc2.weight": Weight(
                "columns", {f"{own}.mlp.down_proj.weight": (hidden, self.intermediate_size)}
            ),
            "eagle_output_layer.weight": Weight(
                "vocabulary", {"lm_head.weight": (self.vocabulary, hidden)}
            ),
        }


def aux_layers(asked: list[int] | None, layers: int) -> tuple[int, ...]:
    """The auxiliary inputs of a draft: of which layers the output is taken, in ascending order.

    Args:
        asked: numbers from 0; -1 is the output of the embedding. None for EAGLE-3's own choice.
        layers: decoder layers of the base.

    Raises:
        SetupError: not three different ones, or one that the base does not have.
    """
    chosen = sorted({1, layers // 2 - 1, layers - 4} if asked is None else set(asked))
    if asked is None and (len(chosen) < AUX_LAYERS or chosen[0] < 0):
        chosen = sorted({-1, (layers - 1) // 2, layers - 1})
        if len(chosen) < AUX_LAYERS:
            chosen = list(range(-1, layers))
    if len(chosen) != AUX_LAYERS or (asked is not None and len(asked) != AUX_LAYERS):
        raise SetupError(
            f"--aux-layers: a draft reads {AUX_LAYERS} different auxiliary hidden states, got "
            f"{' '.join(map(str, asked or chosen))}"
        )
    if chosen[0] < -1 or chosen[-1] >= layers:
        raise SetupError(
            f"--aux-layers {' '.join(map(str, chosen))}: the base has layers 0 to {layers - 1} "
            f"(-1: the output of its embedding)"
        )
    return tuple(chosen)


def draft_config(
    base: PretrainedConfig, shape: DraftShape, layers: tuple[int, ...], dtype: str
) -> dict[str, Any]:
    """What `config.json` of an exported draft says.

    The layers stand in it twice: servers of vLLM's kind count the inputs of layers (the output of layer i
    is the input of layer i + 1, 0 is the embedding), those of SGLang's and TensorRT-LLM's the outputs.
    """
    rope = rope_parameters(base)
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": base.rms_norm_eps,
        "max_position_embeddings": base.max_position_embeddings,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": base.vocab_size,
        "draft_vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "bos_token_id": base.bos_token_id,
        "eos_token_id": base.eos_token_id,
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in layers],
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": list(layers),
        },
    }
