"""What a checkpoint was written by, kept in its manifest: a copied checkpoint takes it along."""

from __future__ import annotations

import argparse
import json
from typing import Any

from post_training.adapters.identity import adapter_facts, check_adapter
from post_training.arguments.distillation import draft_of
from post_training.arguments.refused import ARCHITECTURE
from post_training.checkpoint.optimizer_form import check_optimizer, optimizer_form
from post_training.checkpoint.store import Checkpoint
from post_training.checkpoint.torch_dcp import check_format
from post_training.errors import SetupError
from post_training.files import config_of_run
from post_training.hf.config import sliding_window
from post_training.hf.rotary import rope_parameters

# What the inverse frequencies of the supported rotary embeddings are computed from.
ROPE_KEYS = (
    "rope_type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
# And those of these only; checkpoints of the others never named them.
SCALED = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "short_factor", "long_factor"),
}


def origin(args: argparse.Namespace) -> dict[str, Any]:
    """What the manifest says of the model and the optimizer, in the types of JSON.

    Args:
        args: resolved arguments, before Megatron's validation fills in more, as they are also when a
            checkpoint is chosen.

    Returns:
        The architecture, the format, and what else decides whether optimizer and weights can be read.
    """
    architecture = {key: getattr(args, key) for key in ARCHITECTURE}
    if args.model_backend == "transformers":
        # Names and shapes of all parameters are compared with the checkpoint's (`hf_models/build.py`).
        architecture = {
            key: architecture[key] for key in ("num_layers", "hidden_size", "vocab_size")
        }
        known = args.hf_config is not None
        architecture["hf_class"] = args.hf_config.architectures[0] if known else args.task
    elif args.hf_config is not None:
        rope = rope_parameters(args.hf_config)
        keys = ROPE_KEYS + SCALED.get(str(rope.get("rope_type")), ())
        architecture["rope_parameters"] = {k: rope[k] for k in keys if rope.get(k) is not None}
        architecture["sliding_window"] = sliding_window(args.hf_config)
    architecture["draft"] = draft_of(args)
    found = {
        "architecture": architecture,
        "ckpt_format": args.ckpt_format,
        "optimizer_form": optimizer_form(args),
        "no_save_optim": args.no_save_optim,
        "transformer_impl": args.transformer_impl,
        "model_backend": args.model_backend,
    }
    if args.quantisation is not None:
        found["quantisation"] = args.quantisation.facts()
    adapter = adapter_facts(args)
    if adapter is not None:
        found["lora"] = adapter
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _origin_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is known of who wrote a checkpoint: from its manifest, or `config.yaml` two folders up."""
    manifest = checkpoint.manifest or {}
    if "origin" in manifest:
        written: dict[str, Any] = manifest["origin"]
        return written
    config = config_of_run(checkpoint.path.parent.parent)
    return config | {"architecture": {k: config[k] for k in ARCHITECTURE if k in config}}


def check_origin(
    args: argparse.Namespace, checkpoint: Checkpoint, *, weights_only: bool = False
) -> None:
    """Refuse a checkpoint that this run cannot go on with.

    Args:
        args: resolved arguments.
        checkpoint: what is to be loaded.
        weights_only: its optimizer is left where it is.

    Raises:
        SetupError: it is another model's, of another format, or its optimizer's state is not this run's.
    """
    if args.draft is not None and not checkpoint.has_modelopt:
        raise SetupError(
            f"{checkpoint.path} has no draft: export it with scripts/export_hf.py, and train a new draft "
            f"with that folder as --hf-model in another --output-dir"
        )
    written = _origin_of(checkpoint)
    before = written.get("model_backend", "megatron")
    if before != args.model_backend:
        raise SetupError(
            f"{checkpoint.path} was written with --model-backend {before}, here it is "
            f"{args.model_backend}: their weights have other names; give --model-backend "
            f"{before}, or another --output-dir"
        )
    check_format(args, checkpoint, written)
    here = origin(args)
    for key, before in written.get("architecture", {}).items():
        if key in here["architecture"] and before != here["architecture"][key]:
            raise SetupError(
                f"{checkpoint.path} is another model's checkpoint: its {key} is {before}, this run's "
                f"is {here['architecture'][key]}; choose another --output-dir or --load"
            )
    check_adapter(args, checkpoint.path, written.get("lora"))
    if not args.skip_train:  # an evaluation takes the model as it is
        _check_quantisation(checkpoint, written, here, weights_only)
    if not weights_only:
        check_optimizer(args, checkpoint, written)


def _check_quantisation(
    checkpoint: Checkpoint, written: dict[str, Any], here: dict[str, Any], weights_only: bool
) -> None:
    """Refuse a model that is quantised otherwise; plain weights may be where a run begins."""
    before, now = written.get("quantisation"), here.get("quantisation")
    if before == now or (weights_only and before is None and not checkpoint.has_modelopt):
        return
    told = [
        f"weights in {found['weights']}, inputs in {found['inputs'] or 'all'} bits, blocks of "
        f"{found['block'] or 'none'}"
        if found
        else "not quantised"
        for found in (before, now)
    ]
    if told[0] == told[1]:
        told[1] = "so by other entries of quant_cfg"
    raise SetupError(
        f"{checkpoint.path} is of a model that is {told[0]}, this run's is {told[1]}: give the "
        f"--export-quant-cfg that it was trained with, or another --output-dir"
    )
