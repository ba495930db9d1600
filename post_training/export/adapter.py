"""From a run with low-rank factors to the folder that peft and servers load, read back and compared."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch

from post_training.adapters.layers import adapters, factors_of
from post_training.adapters.peft_folder import write_adapter
from post_training.adapters.settings import chosen_targets
from post_training.errors import SetupError
from post_training.export.hf import CHECK_TEXT, TOLERANCE, largest_difference, logits_of
from post_training.hf.folder import (
    TOKENIZER_FILES,
    copy_files,
    local_model_folder,
    local_tokenizer_folder,
    weights_digest,
)


def check_peft() -> None:
    """Refuse to export where nothing could read the result back.

    Raises:
        SetupError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise SetupError(
            "--adapter: peft, which reads it back, is not installed (pip install '.[lora]')"
        )


def export_adapter(
    chunks: list[Any],
    args: argparse.Namespace,
    tokenizer: Any,
    folder: str | Path,
    *,
    dropout: float,
    dtype: torch.dtype | None = None,
) -> float:
    """Write an adapter as PEFT does, put it on the HuggingFace base with peft and compare logits in fp32.

    Args:
        chunks: the whole unwrapped model in evaluation mode, the list's one chunk; it is used up.
        args: of the model.
        tokenizer: the HuggingFace tokenizer.
        folder: where to write; what is there is replaced (`check_export`).
        dropout: that it was trained with, which PEFT's configuration tells.
        dtype: of the factors; fp32 where it is None.

    Returns:
        Largest difference of a logit, relative to the largest one.

    Raises:
        SetupError: the two do not agree.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    target = Path(folder).absolute()
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model, source = chunks[0], local_model_folder(args.hf_model)
    if dtype is not None:
        for _, adapter in adapters(model):
            for parameter in adapter.parameters():
                parameter.data = parameter.data.to(dtype).float()
    precision = next(model.parameters()).dtype
    local = Path(args.hf_model).is_dir()
    write_adapter(
        partial,
        args.hf_config,
        args.lora,
        {key: value.to(dtype or value.dtype).cpu() for key, value in factors_of(model).items()},
        chosen_targets(args.hf_config, args.lora),
        dropout=dropout,
        base=str(source.absolute()) if local else args.hf_model,
        digest=weights_digest(source),
    )
    copy_files(local_tokenizer_folder(args.hf_tokenizer or args.hf_model), partial, TOKENIZER_FILES)
    tokens = tokenizer(CHECK_TEXT, add_special_tokens=False)["input_ids"][:128]
    expected = logits_of(model.float(), tokens, args.hf_config.vocab_size)
    chunks.clear()
    # Rounded as the run rounded it.
    base = AutoModelForCausalLM.from_pretrained(source, dtype=precision).float()
    reloaded: Any = PeftModel.from_pretrained(base, str(partial))
    difference = largest_difference(reloaded.eval(), tokens, expected)
    if not difference <= TOLERANCE:
        raise SetupError(
            f"the base with the folder's adapter gives other logits than the trained model, by "
            f"{difference:.2e} of the largest one (allowed {TOLERANCE:.0e}); it is left in {partial}"
        )
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return difference
