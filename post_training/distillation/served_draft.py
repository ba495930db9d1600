"""An exported draft, read and run as a server does: in plain torch, from nothing but its folder.

Queries of tokens that the base has verified are computed from the base's own features, and their keys are
kept. When the draft goes on, each query reads what the one before it made; those keys are dropped again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from post_training.distillation.draft_attention import rotated
from post_training.errors import SetupError
from post_training.hf.draft import AUX_LAYERS, DraftShape
from post_training.hf.rotary import inverse_frequencies

WEIGHTS = "model.safetensors"
_INPUTS = "eagle_aux_hidden_state_layer_ids"
_KEYS: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads"), int),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "vocab_size", "draft_vocab_size"), int),
    "max_position_embeddings": int,
    **dict.fromkeys(("rope_theta", "rms_norm_eps"), int | float),
}


class ServedDraft:
    """One draft with the keys and values of one sequence."""

    def __init__(self, folder: str | Path, embedding: Tensor) -> None:
        """Read a folder.

        Args:
            folder: with `config.json` and `model.safetensors`.
            embedding: of the base: [vocabulary, hidden].

        Raises:
            SetupError: it is no draft, a tensor is missing or has another shape, or `d2t` leads outside.
        """
        from transformers import LlamaConfig

        self.folder = Path(folder)
        try:
            config = self.config = _checked(json.loads((self.folder / "config.json").read_text()))
            drafted: int = config["draft_vocab_size"]
            llama = LlamaConfig(**config)
            self.shape = DraftShape.of(llama, drafted)
            self._frequencies = inverse_frequencies(llama)
            tensors = load_file(self.folder / WEIGHTS)
        except Exception as error:  # of many classes, from three libraries
            reason = " ".join(str(error).split())
            raise SetupError(f"{folder}: holds no draft ({reason})") from error
        self.vocabulary: int = config["vocab_size"]
        wanted = {n: s for w in self.shape.weights().values() for n, s in w.tensors.items()}
        if drafted != self.vocabulary:
            wanted |= {"d2t": (drafted,), "t2d": (self.vocabulary,)}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise SetupError(
                    f"{folder}: {name} has shape {found.get(name)}, config.json says {wanted.get(name)}"
                )
        if embedding.shape != (self.vocabulary, self.shape.hidden_size):
            raise SetupError(
                f"{folder}: a draft of a base with {self.vocabulary} tokens and hidden size "
                f"{self.shape.hidden_size}; this one has {tuple(embedding.shape)}"
            )
        numbers = torch.arange(drafted)
        self.tokens = tensors["d2t"] + numbers if drafted != self.vocabulary else numbers
        if drafted != self.vocabulary:
            marked = torch.nonzero(tensors["t2d"]).flatten()
            if not torch.equal(self.tokens.sort().values, marked):
                raise SetupError(f"{folder}: d2t and t2d do not name the same tokens")
        self.embedding = embedding.float()
        self._tensors = {n: t.float() for n, t in tensors.items() if n not in ("d2t", "t2d")}
        self.restart()

    @property
    def input_layers(self) -> list[int]:
        """Which hidden states of the base it reads: 0 is the embedding's, i that of layer i - 1."""
        return list(self.config[_INPUTS])

    def restart(self) -> None:
        """Begin another sequence."""
        self._keys = torch.empty(0, self.shape.key_value_heads, self.shape.head_dim)
        self._values = self._keys.clone()

    def features(self, aux_hidden_states: Tensor) -> Tensor:
        """[tokens, 3 * hidden] of the base to [tokens, hidden]."""
        return aux_hidden_states.float() @ self._tensors["fc.weight"].t()

    def extend(self, tokens: Tensor, hidden: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Compute queries behind those that are kept, which see these and, causally, each other.

        Args:
            tokens: that each query reads: int64 [queries].
            hidden: features, or what the query before has made: [queries, hidden].
            position: of the first query.

        Returns:
            What a next query reads, [queries, hidden], and logits, [queries, draft vocabulary].
        """
        t, shape, eps = self._tensors, self.shape, self.config["rms_norm_eps"]

        def norm(x: Tensor, name: str) -> Tensor:
            return F.rms_norm(x, (shape.hidden_size,), t[f"{name}.weight"], eps)

        def projected(x: Tensor, name: str, heads: int) -> Tensor:
            return (x @ t[f"midlayer.self_attn.{name}_proj.weight"].t()).view(len(x), heads, -1)

        read = torch.cat(
            [
                norm(self.embedding[tokens], "midlayer.input_layernorm"),
                norm(hidden, "midlayer.hidden_norm"),
            ],
            dim=-1,
        )
        places = torch.arange(position, position + len(tokens)).float()
        angles = torch.outer(places, self._frequencies).repeat(1, 2)[:, None]
        query = rotated(projected(read, "q", shape.heads), angles)
        key = rotated(projected(read, "k", shape.key_value_heads), angles)
        self._keys = torch.cat([self._keys, key])
        self._values = torch.cat([self._values, projected(read, "v", shape.key_value_heads)])
        seen = torch.ones(len(tokens), len(self._keys), dtype=torch.bool)
        seen = seen.tril(len(self._keys) - len(tokens))
        mixed = F.scaled_dot_product_attention(
            query.transpose(0, 1),
            self._keys.transpose(0, 1),
            self._values.transpose(0, 1),
            attn_mask=seen,
            enable_gqa=True,
        )
        mixed = mixed.transpose(0, 1).flatten(1)
        hidden = hidden + mixed @ t["midlayer.self_attn.o_proj.weight"].t()
        inner = norm(hidden, "midlayer.post_attention_layernorm")
        gate = F.silu(inner @ t["midlayer.mlp.gate_proj.weight"].t())
        up = inner @ t["midlayer.mlp.up_proj.weight"].t()
        hidden = hidden + (gate * up) @ t["midlayer.mlp.down_proj.weight"].t()
        return hidden, norm(hidden, "norm") @ t["lm_head.weight"].t()

    def forget(self, count: int) -> None:
        """Drop the keys of the last `count` queries."""
        if count:
            self._keys, self._values = self._keys[:-count], self._values[:-count]

    @torch.no_grad()
    def draft(self, tokens: Tensor, aux_hidden_states: Tensor, count: int) -> Tensor:
        """Write on after what the base has verified.

        Args:
            tokens: that follow each of the verified ones, the last being the base's newest: int64 [new].
            aux_hidden_states: of the verified tokens that are new: [new, 3 * hidden].
            count: how many tokens to draft.

        Returns:
            int64 [count], tokens of the base's vocabulary.
        """
        position = len(self._keys)
        hidden, logits = self.extend(tokens, self.features(aux_hidden_states), position)
        drafted = []
        for step in range(count):
            token = self.tokens[logits[-1].argmax()].view(1)
            drafted.append(token)
            if step < count - 1:
                hidden, logits = self.extend(token, hidden[-1:], position + len(tokens) + step)
        self.forget(count - 1)
        return torch.cat(drafted)


def _checked(config: Any) -> dict[str, Any]:
    """A `config.json` of which all that a server reads is there and makes sense.

    Raises:
        ValueError: saying what does not.
    """
    if not isinstance(config, dict) or config.get("architectures") != ["LlamaForCausalLMEagle3"]:
        raise ValueError("config.json describes no EAGLE-3 draft")
    for key, kind in _KEYS.items():
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 1e30:
            raise ValueError(f"config.json has {key} {value!r}, no number above 0")
    inputs: Any = config.get(_INPUTS)
    own = config.get("eagle_config")
    whole = isinstance(inputs, list) and all(type(n) is int and n >= 0 for n in inputs)
    if not whole or len(inputs) != AUX_LAYERS or inputs != sorted(set(inputs)):
        raise ValueError(
            f"config.json has {_INPUTS} {inputs!r}, not {AUX_LAYERS} ascending numbers"
        )
    outputs = own.get(_INPUTS) if isinstance(own, dict) else None
    if outputs != [number - 1 for number in inputs]:
        raise ValueError(
            f"config.json counts layers twice, as {inputs} and {outputs!r}: not the same"
        )
    return config
