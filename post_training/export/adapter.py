"""From a run with low-rank factors to the folder that peft and servers load, read back and compared."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch

from post_training.adapters import injected
from post_training.adapters.layers import adapters, factors_of, merge_adapters
from post_training.adapters.peft_folder import write_adapter
from post_training.adapters.settings import chosen_targets
from post_training.errors import SetupError
from post_training.export.hf import TOLERANCE, check_input, largest_difference, logits_of
from post_training.hf.causal_lm import auto_class
from post_training.hf.folder import (
    TOKENIZER_FILES,
    copy_files,
    local_model_folder,
    local_tokenizer_folder,
    weights_digest,
)
from post_training.hf_models.model import HFModel


def check_peft() -> None:
    """Refuse to export where nothing could read the result back.

    Raises:
        SetupError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise SetupError(
            "--adapter: peft, which reads it back, is not installed (pip install '.[lora]')"
        )


def merge(model: Any, *, rounded: bool = True) -> None:
    """Turn the whole model of a run, with factors or without, into one without that computes the same.

    Args:
        model: unwrapped.
        rounded: changed matrices keep their dtype; else they are in fp32 afterwards, so that another dtype
            is rounded to once.
    """
    if isinstance(model, HFModel):
        injected.merge_factors(model.model, rounded=rounded)
    else:
        merge_adapters(model, rounded=rounded)


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
        SetupError: the two do not agree, or peft refuses the factors.
    """
    from peft import PeftModel

    target = Path(folder).absolute()
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model, source = chunks[0], local_model_folder(args.hf_model)
    theirs = isinstance(model, HFModel)
    if dtype is not None:
        of_megatron = (parameter for _, a in adapters(model) for parameter in a.parameters())
        for parameter in injected.factors_of(model).values() if theirs else of_megatron:
            parameter.data = parameter.data.to(dtype).float()
    factors = injected.factors_of(model.model) if theirs else factors_of(model)
    precision = next(model.parameters()).dtype
    local = Path(args.hf_model).is_dir()
    write_adapter(
        partial,
        args.hf_config,
        args.lora,
        {key: f.detach().to(dtype or f.dtype).cpu() for key, f in factors.items()},
        chosen_targets(args.hf_config, args.lora),
        dropout=dropout,
        base=str(source.absolute()) if local else args.hf_model,
        digest=weights_digest(source),
    )
    copy_files(local_tokenizer_folder(args.hf_tokenizer or args.hf_model), partial, TOKENIZER_FILES)
    tokens, seen = check_input(model, args.hf_config, tokenizer)
    vocabulary = args.hf_config.get_text_config().vocab_size
    expected = logits_of(model.float(), tokens, vocabulary, seen)
    chunks.clear()
    # Rounded as the run rounded it.
    base = auto_class(args.hf_config).from_pretrained(
        source, dtype=precision, trust_remote_code=args.trust_remote_code
    )
    if args.lora.nf4:
        injected.round_to_nf4(base, args.hf_config)
    try:
        reloaded: Any = PeftModel.from_pretrained(base.float(), str(partial))
    except ValueError as error:
        raise SetupError(
            f"--adapter: peft does not read these factors ({error}); they are left in {partial}, and "
            f"--merge writes a whole model with them"
        ) from error
    difference = largest_difference(reloaded.eval(), tokens, expected, seen)
    if not difference <= TOLERANCE:
        raise SetupError(
            f"the base with the folder's adapter gives other logits than the trained model, by "
            f"{difference:.2e} of the largest one (allowed {TOLERANCE:.0e}); it is left in {partial}"
        )
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return difference
