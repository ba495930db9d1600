"""Which adapter of which base a checkpoint holds."""

from __future__ import annotations

import argparse
from typing import Any

from post_training.adapters.settings import LoraSettings, chosen_targets
from post_training.errors import SetupError
from post_training.hf.folder import local_model_folder, weights_digest


def base_digest(args: argparse.Namespace, like: str | None = None) -> str:
    """Of the weights of `--hf-model`; `like` as of `weights_digest`."""
    return weights_digest(local_model_folder(args.hf_model), like=like)


def adapter_facts(args: argparse.Namespace) -> dict[str, Any] | None:
    """What a manifest says of the run's adapter, and of the weights that it belongs to."""
    if args.lora is None:
        return None
    return {**args.lora.facts(), "base": base_digest(args)}


def check_adapter(args: argparse.Namespace, path: object, written: dict[str, Any] | None) -> None:
    """Refuse a checkpoint that holds another adapter than this run's, or whole weights.

    Args:
        args: resolved arguments.
        path: of the checkpoint, for messages.
        written: `adapter_facts` of the run that wrote it.

    Raises:
        SetupError: it does not fit.
    """
    if written is None and args.lora is None:
        return
    if args.lora is None:
        raise SetupError(
            f"{path} holds an adapter only: give the LoRA flags that it was trained with, or another "
            f"--output-dir or --load"
        )
    if written is None:
        raise SetupError(
            f"{path} holds a whole model: leave the LoRA flags out; or export it with scripts/export_hf.py "
            f"and give that folder as --hf-model with another --output-dir"
        )
    before = LoraSettings.of(written)
    if before != args.lora and chosen_targets(args.hf_config, before) != chosen_targets(
        args.hf_config, args.lora
    ):
        raise SetupError(
            f"{path} holds another adapter: its rank is {before.rank}, alpha {before.alpha:g}, targets "
            f"{before.targets}; this run's are {args.lora.rank}, {args.lora.alpha:g}, {args.lora.targets}"
        )
    if before.nf4 != args.lora.nf4:
        raise SetupError(
            f"{path} holds an adapter of a base that was {'' if before.nf4 else 'not '}in 4 bits: "
            f"{'give' if before.nf4 else 'leave out'} --base-precision nf4"
        )
    if written["base"] != base_digest(args, like=written["base"]):
        raise SetupError(
            f"{path} holds an adapter of other weights than those of --hf-model {args.hf_model}: give its "
            f"base"
        )
