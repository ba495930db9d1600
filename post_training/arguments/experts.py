"""The flags of experts and of their load balancing."""

from __future__ import annotations

import argparse
from typing import Any

from post_training.errors import SetupError


def complete_expert_flags(args: argparse.Namespace) -> None:
    """Check the flags of the experts and settle the load balancing loss.

    HuggingFace models add no such loss unless their configuration asks for it, so neither does a run:
    `--moe-aux-loss-coeff` turns it on. Its one kind is computed by `post_training.model.router`, so
    Megatron's own is off in any case.

    Raises:
        SetupError: a flag needs experts or cannot give the same numbers on every layout; or config.json
            asks for a loss that the flags do not mention.
    """
    coefficient = _coefficient(args.moe_aux_loss_coeff)
    if not args.num_experts:
        if coefficient:
            raise SetupError(f"--moe-aux-loss-coeff {coefficient}: the model has no experts")
        args.moe_aux_loss_coeff = 0.0
        return
    if args.moe_router_topk > args.num_experts:
        raise SetupError(
            f"--moe-router-topk {args.moe_router_topk}: the model has only {args.num_experts} experts"
        )
    if args.add_bias_linear and args.tensor_model_parallel_size > 1:
        # Megatron adds no biases to experts whose matrices are split.
        args.expert_tensor_parallel_size = args.expert_tensor_parallel_size or 1
    if args.moe_grouped_gemm and args.transformer_impl != "transformer_engine":
        raise SetupError("--moe-grouped-gemm needs --transformer-impl transformer_engine")
    kinds = args.moe_router_load_balancing_type
    kind = kinds if isinstance(kinds, str) else " ".join(kinds)
    if kind not in ("none", "seq_aux_loss"):
        raise SetupError(
            f"--moe-router-load-balancing-type {kind}: balances over a micro batch, so that results depend "
            f"on its size and the parallel layout; use seq_aux_loss, which balances each document"
        )
    if kind == "seq_aux_loss" and not coefficient:
        raise SetupError("--moe-router-load-balancing-type seq_aux_loss needs --moe-aux-loss-coeff")
    if coefficient is None and not args.skip_train:
        _check_config_asks_for_none(args.hf_config)
    if coefficient and args.moe_router_score_function != "softmax":
        raise SetupError("--moe-aux-loss-coeff needs --moe-router-score-function softmax")
    recomputed = args.moe_layer_recompute or "moe" in (args.recompute_modules or ())
    if recomputed and args.pipeline_model_parallel_size > 1:
        raise SetupError(
            "--recompute-modules moe with pipeline parallelism: when a layer is recomputed its router "
            "would see another micro batch's documents; use --recompute-granularity full"
        )
    args.moe_router_load_balancing_type = "none"
    args.moe_aux_loss_coeff = coefficient or 0.0


def _coefficient(value: Any) -> float | None:
    """The one coefficient that was given, or None."""
    if isinstance(value, list):
        if len(value) != 1:
            raise SetupError(f"--moe-aux-loss-coeff {value}: give one coefficient")
        value = value[0]
    return None if value is None else float(value)


def _check_config_asks_for_none(hf_config: Any) -> None:
    if getattr(hf_config, "output_router_logits", False):
        theirs = getattr(hf_config, "router_aux_loss_coef", None)
        raise SetupError(
            f"config.json sets output_router_logits, with which transformers adds a load balancing loss "
            f"(router_aux_loss_coef {theirs}): give --moe-aux-loss-coeff, 0 for none; mind that here it is "
            f"a mean over documents for each layer, there one term for all layers together"
        )
