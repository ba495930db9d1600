"""The weights of a HuggingFace folder, looked at before a run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from post_training.errors import SetupError
from post_training.hf.checkpoint import HFCheckpoint
from post_training.hf.families import model_weights
from post_training.tensors.weight import Shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# As the header of a safetensors file writes them.
DTYPES = ("F32", "BF16", "F16")
# Computed from config.json, by `transformers` too; Llama checkpoints of old hold them.
COMPUTED = re.compile(r".*\brotary_emb\.(inv_freq|cos_cached|sin_cached)")


def expected_tensors(config: PretrainedConfig) -> Shapes:
    """Names and shapes of all tensors that a HuggingFace folder of this configuration holds."""
    every = (weight.tensors for weight in model_weights(config).values())
    return {name: shape for tensors in every for name, shape in tensors.items()}


def check_hf_weights(folder: str | Path, config: PretrainedConfig) -> None:
    """Check that the weights are those of the configuration, all of them and no others.

    Only the headers of the files are read, and some rows of a head that should be tied.

    Raises:
        SetupError: files or tensors are missing; a dtype is one of quantised weights; there are tensors
            that the model has no place for; or a shape is not what config.json says.
    """
    expected = expected_tensors(config)
    with HFCheckpoint(folder) as checkpoint:
        for name, shape in expected.items():
            if name not in checkpoint:
                raise SetupError(f"--hf-model {folder}: the weights lack the tensor {name}")
            found = checkpoint.slice(name)
            dtype, its_shape = found.get_dtype(), tuple(found.get_shape())
            if dtype not in DTYPES:
                raise SetupError(
                    f"--hf-model {folder}: {name} is {dtype}; only fp32, bf16 and fp16 weights can be "
                    f"trained, so give the model's bf16 weights"
                )
            if its_shape != shape:
                raise SetupError(
                    f"--hf-model {folder}: {name} has shape {list(its_shape)}, "
                    f"config.json says {list(shape)}"
                )
        # As transformers, which has no multi-token prediction: the layers behind the last.
        layers = config.num_hidden_layers
        further = range(layers, layers + (getattr(config, "num_nextn_predict_layers", 0) or 0))
        passed = tuple(f"model.layers.{layer}." for layer in further)
        leftovers = [
            name
            for name in checkpoint
            if not (name in expected or COMPUTED.fullmatch(name) or name.startswith(passed))
        ]
        if config.tie_word_embeddings and "lm_head.weight" in leftovers:
            leftovers.remove("lm_head.weight")
            weights = model_weights(config)["embedding.word_embeddings.weight"]
            _check_tied_head(checkpoint, next(iter(weights.tensors)))
        if leftovers:
            refuse_leftovers(leftovers, folder, config)


def refuse_leftovers(names: Iterable[str], folder: str | Path, config: PretrainedConfig) -> None:
    """Refuse tensors that the model has no place for.

    Raises:
        SetupError: naming them.
    """
    names = sorted(names)
    shown, more = names[:3], len(names[3:])
    raise SetupError(
        f"--hf-model {folder}: the weights hold {len(names)} tensor{'s' * (len(names) > 1)} that a "
        f"{config.architectures[0]} of {config.num_hidden_layers} layers has no place for: "
        f"{', '.join(shown)}{f' and {more} more' if more else ''}; without them it would be another model"
    )


def _check_tied_head(checkpoint: HFCheckpoint, its_name: str, rows: int = 64) -> None:
    """Check that the head of a tied model is the embedding, by rows spread over the vocabulary.

    `transformers` does not tie the two where both are there and differ.

    Raises:
        SetupError: they differ.
    """
    head, embedding = (checkpoint.slice(name) for name in ("lm_head.weight", its_name))
    size = embedding.get_shape()[0]
    same = head.get_shape() == embedding.get_shape() and all(
        torch.equal(head[row : row + 1].float(), embedding[row : row + 1].float())
        for row in range(0, size, max(1, size // rows))
    )
    if not same:
        raise SetupError(
            f"--hf-model {checkpoint.folder}: lm_head.weight is not {its_name}, though "
            f"config.json ties them; give it tie_word_embeddings false"
        )
