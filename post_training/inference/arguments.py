"""The arguments of one whole model in one process: what of a run's `config.yaml` a model needs, no more.

A run is read for inference on another machine, in another layout and without training. What its flags say
of these has no meaning there, and much of it could not be had: a folder written with Transformer Engine
on a cluster is exported on a CPU. So nothing is taken over but the names listed here.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from post_training.arguments.parser import parse_arguments
from post_training.arguments.refused import ARCHITECTURE
from post_training.errors import SetupError
from post_training.files import DERIVED
from post_training.hf.config import load_hf_config
from post_training.job.output import MODEL_FOLDER
from post_training.machine.kernels import has_transformer_engine

# What a model is made from and computes with. Left out although it touches numbers: noise that regularises
# training (dropout, --moe-input-jitter-eps), and fp8, fp4 and fp32 residuals, which are Transformer
# Engine's ways to train the same weights.
FOR_INFERENCE = frozenset(
    {
        *ARCHITECTURE,
        # Deprecated spellings, which Megatron turns into the position embedding's type.
        *("use_rotary_position_embeddings", "add_position_embedding"),
        # The size of learned position embeddings, and the longest document of training.
        *("max_position_embeddings", "seq_length"),
        *("make_vocab_size_divisible_by", "padded_vocab_size"),
        *("fp16", "bf16", "moe_router_dtype"),
        *("hf_model", "hf_tokenizer", "trust_remote_code", "model_backend"),
        *("draft", "aux_layers", "draft_vocab_size", "draft_ttt_steps", "export_offline_model"),
        # How prompts are written.
        *("chat_template_variables", "template_date"),
    }
)
_PRECISIONS: dict[Any, str] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def arguments_of_run(
    folder: Path,
    config: Mapping[str, Any],
    *,
    by_modelopt: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> argparse.Namespace:
    """Arguments for the model of a run.

    Args:
        folder: its output folder, from which model configuration and tokenizer are read.
        config: its `config.yaml`.
        by_modelopt: ModelOpt converted the checkpoint's model, and names the modules that it was made of.
        settings: what is otherwise here: layout, layers, precision.

    Returns:
        As `parse_arguments`. The precision is the run's, on any machine.

    Raises:
        SetupError: the model needs Transformer Engine, which is not here, or the folder lacks something.
    """
    derived = set(config.get(DERIVED) or ())
    found = {
        key: value for key, value in config.items() if key in FOR_INFERENCE and key not in derived
    }
    for key in ("hf_model", "hf_tokenizer"):
        if found.get(key):
            found[key] = str(folder / MODEL_FOLDER)
    found["transformer_impl"] = _implementation(config, by_modelopt)
    return _parsed(found | dict(settings or {}), str(folder))


def arguments_of_hf_model(
    name: str, *, settings: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Arguments for a HuggingFace folder or hub name, in the precision that its configuration names.

    Args:
        name: of the folder, or on the hub.
        settings: what is otherwise here, as of `arguments_of_run`.

    Returns:
        As `parse_arguments`.

    Raises:
        SetupError: it cannot be loaded.
    """
    config = load_hf_config(name)
    found: dict[str, Any] = {"hf_model": name, "transformer_impl": "local"}
    precision = _PRECISIONS.get(getattr(config, "dtype", None))
    if precision is not None:
        found[precision] = True
    # Nothing is written there: the parser wants a run's folder.
    return _parsed(found | dict(settings or {}), tempfile.gettempdir())


def _parsed(settings: dict[str, Any], output_dir: str) -> argparse.Namespace:
    settings |= {
        "output_dir": output_dir,
        "skip_train": True,
        # Said, because a GPU's default is another.
        "fp32": not (settings.get("bf16") or settings.get("fp16")),
    }
    return parse_arguments([], settings=settings)


def _implementation(config: Mapping[str, Any], by_modelopt: bool) -> str:
    """The layers that read the checkpoint: the local ones, which run anywhere, where they can.

    Raises:
        SetupError: only those of Transformer Engine can, and it is not here.
    """
    if config.get("layernorm_zero_centered_gamma") and not has_transformer_engine():
        raise SetupError(
            "the model was trained with --apply-layernorm-1p: only Transformer Engine computes "
            "its norms, which needs a CUDA device and its package (pip install '.[te]')"
        )
    theirs = by_modelopt and config.get("transformer_impl") == "transformer_engine"
    if config.get("layernorm_zero_centered_gamma") or (theirs and has_transformer_engine()):
        return "transformer_engine"
    return "local"
