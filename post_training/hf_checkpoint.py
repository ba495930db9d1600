"""The safetensors files of a HuggingFace folder: read by parts, and looked at before a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from post_training.errors import SetupError
from post_training.hf_config import head_dim, megatron_flags

# As the header of a safetensors file writes them.
DTYPES = ("F32", "BF16", "F16")
# Computed from config.json, by `transformers` too; Llama checkpoints of old hold them.
_COMPUTED = re.compile(r".*\brotary_emb\.(inv_freq|cos_cached|sin_cached)")


class HFCheckpoint:
    """The safetensors files of a HuggingFace folder, read by rows and columns, not as a whole."""

    def __init__(self, folder: str | Path) -> None:
        """Index the tensors of `folder`, from the headers of its files.

        Raises:
            SetupError: the folder holds no safetensors weights, or not all of its files, whole.
        """
        self.folder = Path(folder)
        self._files: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        try:
            self._index()
        except (SafetensorError, json.JSONDecodeError, KeyError) as error:
            self._stack.close()
            raise SetupError(f"--hf-model {folder}: weight files are damaged ({error})") from error

    def _index(self) -> None:
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        places: dict[str, str] = {}
        if index.is_file():
            places = json.loads(index.read_text())["weight_map"]
        files = set(places.values())
        if not files and single.is_file():
            files = {single.name}
        if not files:
            found = ", ".join(sorted(p.name for p in self.folder.glob("*.bin"))) or "no weights"
            raise SetupError(
                f"--hf-model {self.folder}: needs model.safetensors or "
                f"model.safetensors.index.json, found {found}"
            )
        missing = [file for file in files if not (self.folder / file).is_file()]
        if missing:
            raise SetupError(
                f"--hf-model {self.folder}: missing weight files {', '.join(sorted(missing))}"
            )
        for file in sorted(files):
            for name in self._opened(file).keys():
                if places.get(name, file) == file:
                    self._files[name] = file

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = self._stack.enter_context(
                safe_open(self.folder / file, framework="pt")
            )
        return self._open[file]

    def __enter__(self) -> HFCheckpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._files)

    def slice(self, name: str) -> Any:
        """A lazy view of one tensor: indexing it reads just that part from the file."""
        return self._opened(self._files[name]).get_slice(name)


def expected_tensors(config: PretrainedConfig) -> Iterator[str]:
    """Names of all tensors that a HuggingFace folder of this configuration holds."""
    yield from ("model.embed_tokens.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        yield "lm_head.weight"
    architecture = config.architectures[0]
    attention = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
    if architecture == "Qwen2ForCausalLM":
        attention += ["q_proj.bias", "k_proj.bias", "v_proj.bias"]
    if architecture.startswith("Qwen3"):
        attention += ["q_norm.weight", "k_norm.weight"]
    projections = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    sparse = megatron_flags(config).get("moe_layer_freq", [0] * config.num_hidden_layers)
    for layer, has_experts in enumerate(sparse):
        prefix = f"model.layers.{layer}."
        yield from (prefix + "input_layernorm.weight", prefix + "post_attention_layernorm.weight")
        yield from (f"{prefix}self_attn.{name}" for name in attention)
        if has_experts:
            yield prefix + "mlp.gate.weight"
            for expert in range(config.num_experts):
                yield from (f"{prefix}mlp.experts.{expert}.{name}" for name in projections)
        else:
            yield from (f"{prefix}mlp.{name}" for name in projections)


def _expected_shapes(config: PretrainedConfig) -> dict[str, list[int]]:
    """Shapes of a few tensors of each end."""
    shapes = {
        "model.embed_tokens.weight": [config.vocab_size, config.hidden_size],
        "model.norm.weight": [config.hidden_size],
    }
    heads = config.num_attention_heads * head_dim(config)
    for layer in {0, config.num_hidden_layers - 1}:
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = [heads, config.hidden_size]
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = [config.vocab_size, config.hidden_size]
    return shapes


def check_hf_weights(folder: str | Path, config: PretrainedConfig) -> None:
    """Check that the weights are those of the configuration, all of them and no others.

    Only the headers of the files are read, and some rows of a head that should be tied.

    Raises:
        SetupError: files or tensors are missing; a dtype is one of quantised weights; there are tensors
            that the model has no place for; or a shape is not what config.json says.
    """
    expected = dict.fromkeys(expected_tensors(config))
    with HFCheckpoint(folder) as checkpoint:
        for name in expected:
            if name not in checkpoint:
                raise SetupError(f"--hf-model {folder}: the weights lack the tensor {name}")
            dtype = checkpoint.slice(name).get_dtype()
            if dtype not in DTYPES:
                raise SetupError(
                    f"--hf-model {folder}: {name} is {dtype}; only fp32, bf16 and fp16 weights can be "
                    f"trained, so give the model's bf16 weights"
                )
        leftovers = [n for n in checkpoint if n not in expected and not _COMPUTED.fullmatch(n)]
        if config.tie_word_embeddings and "lm_head.weight" in leftovers:
            leftovers.remove("lm_head.weight")
            _check_tied_head(checkpoint)
        if leftovers:
            _refuse_leftovers(leftovers, folder, config)
        for name, shape in _expected_shapes(config).items():
            found = list(checkpoint.slice(name).get_shape())
            if found != shape:
                raise SetupError(
                    f"--hf-model {folder}: {name} has shape {found}, config.json says {shape}"
                )


def _refuse_leftovers(names: Iterable[str], folder: str | Path, config: PretrainedConfig) -> None:
    names = sorted(names)
    shown, more = names[:3], len(names[3:])
    raise SetupError(
        f"--hf-model {folder}: the weights hold {len(names)} tensor{'s' * (len(names) > 1)} that a "
        f"{config.architectures[0]} of {config.num_hidden_layers} layers has no place for: "
        f"{', '.join(shown)}{f' and {more} more' if more else ''}; without them it would be another model"
    )


def _check_tied_head(checkpoint: HFCheckpoint, rows: int = 64) -> None:
    """Check that the head of a tied model is the embedding, by rows spread over the vocabulary.

    `transformers` does not tie the two where both are there and differ.

    Raises:
        SetupError: they differ.
    """
    head, embedding = (
        checkpoint.slice(name) for name in ("lm_head.weight", "model.embed_tokens.weight")
    )
    size = embedding.get_shape()[0]
    same = head.get_shape() == embedding.get_shape() and all(
        torch.equal(head[row : row + 1].float(), embedding[row : row + 1].float())
        for row in range(0, size, max(1, size // rows))
    )
    if not same:
        raise SetupError(
            f"--hf-model {checkpoint.folder}: lm_head.weight is not model.embed_tokens.weight, though "
            f"config.json ties them; give it tie_word_embeddings false"
        )
