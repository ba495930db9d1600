"""Builds the model of a run: from a HuggingFace folder or from Megatron's flags."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.training.argument_utils import gpt_config_from_args

from post_training.adapters.layers import add_adapters
from post_training.adapters.settings import chosen_targets
from post_training.checkpoint.store import Checkpoint
from post_training.distillation.draft_forward import install_forward
from post_training.distillation.draft_model import DraftSettings, add_draft, own_layers
from post_training.errors import SetupError
from post_training.files import json_object
from post_training.hf.check import check_hf_weights
from post_training.hf.draft import DraftShape
from post_training.hf.families import Factors, family_of
from post_training.hf.folder import local_model_folder
from post_training.hf.rotary import RotaryScaling, rope_parameters
from post_training.hf.weights import load_hf_weights
from post_training.hf_models.build import check_model, hf_model_config
from post_training.knowledge.distiller import install_distiller
from post_training.knowledge.settings import KnowledgeSettings
from post_training.knowledge.teacher import Teacher, build_teacher
from post_training.machine.device import device_type
from post_training.model.hybrid import hybrid_config
from post_training.model.layer_spec import decoder_block_spec, uses_packed_attention
from post_training.model.residual import install_factors
from post_training.model.rotary import install_rotary
from post_training.model.router import follow_documents
from post_training.platform.modelopt_quantisation import mend_scales


def model_config(
    args: argparse.Namespace,
    checkpoint: Checkpoint | None,
    *,
    draft_tokens: torch.Tensor | None = None,
    knowledge: KnowledgeSettings | None = None,
    teacher: Teacher | None = None,
    say: Callable[[str], None] | None = None,
) -> Any:
    """What `pretrain()` builds the model of this run from: Megatron's `GPTModelConfig`, or one like it.

    Args:
        args: validated arguments.
        checkpoint: what will be loaded, if anything.
        draft_tokens: those that a new draft can write: int64 [draft vocabulary]; None: all.
        knowledge: what the model learns of a teacher, if it has one.
        teacher: which; None: what is stored with the documents.
        say: tells the user, on rank 0, what is found out while the model is set up.

    Returns:
        The configuration. Its hooks put in rotary embeddings for packed documents and, unless a
        checkpoint will be loaded, the HuggingFace weights.
    """
    if args.model_backend == "transformers":
        return hf_model_config(args, checkpoint, say)
    hybrid = args.hybrid_layer_pattern is not None
    if hybrid:
        config = hybrid_config(args)
    else:
        config = gpt_config_from_args(args)
        config.transformer_layer_spec = functools.partial(
            decoder_block_spec, hf_config=args.hf_config, norms_apart=args.lora is not None
        )
    transformer = config.transformer
    factors = None
    if args.hf_config is not None:
        factors = family_of(args.hf_config).factors(args.hf_config)
        transformer.softmax_scale = factors.scores
    if args.export_offline_model:
        transformer.num_layers = 0
    # Of several rows a stage sends a view of its output (`split_stage_output`), in training or
    # evaluation: its memory cannot be given away.
    sizes = {args.micro_batch_size, args.eval_micro_batch_size or 1}
    transformer.deallocate_pipeline_outputs = sizes == {1}
    if args.fsdp_compute_dtype is not None:
        transformer.autocast_dtype = args.fsdp_compute_dtype
    transformer.fsdp_sharding = args.fsdp_sharding
    from_hf = takes_hf_weights(args, checkpoint)
    if from_hf or (checkpoint is not None and not checkpoint.has_modelopt):
        # Every parameter is overwritten. (ModelOpt looks at the weights while it converts.)
        transformer.perform_initialization = False
    hooks: list[Any] = []
    if not hybrid:
        hooks.append(functools.partial(_install_rotary, hf_config=args.hf_config))
    if factors is not None:
        hooks.append(functools.partial(_install_factors, factors=factors))
    if args.num_experts:
        hooks.append(functools.partial(follow_documents))
    if checkpoint is not None and checkpoint.has_modelopt:
        hooks.append(functools.partial(_convert_by_modelopt, checkpoint=checkpoint, args=args))
    if from_hf:
        hooks.append(
            functools.partial(_fill_weights, folder=args.hf_model, hf_config=args.hf_config)
        )
    if args.lora is not None:
        hooks.append(functools.partial(_add_adapters, args=args, begins=checkpoint is None))
    if args.draft is not None and checkpoint is None:
        hooks.append(functools.partial(_add_draft, args=args, tokens=draft_tokens))
    if knowledge is not None:
        hooks.append(
            functools.partial(_add_teacher, args=args, knowledge=knowledge, teacher=teacher)
        )
    if device_type() == "cuda" and (args.skip_train or not args.use_torch_fsdp2):
        hooks.append(functools.partial(_move_to_gpu))
    config.pre_wrap_hooks = [*config.pre_wrap_hooks, *hooks]
    return config


def takes_hf_weights(args: argparse.Namespace, checkpoint: Checkpoint | None) -> bool:
    """Whether the weights of `--hf-model` are taken: to start from, or to train factors beside."""
    return (
        args.hf_config is not None
        and not args.random_weights
        and (checkpoint is None or args.lora is not None)
    )


def check_weights(args: argparse.Namespace, checkpoint: Checkpoint | None) -> None:
    """Look at the weight files before any process group starts.

    Raises:
        SetupError: files are missing, damaged, or hold another model than config.json describes; or context
            parallelism is asked of a model that ModelOpt converted, or Transformer Engine of one whose
            rotary frequencies depend on the length of a document; or a new draft has no base, or no tokens.
    """
    generation = Path(args.hf_model or "", "generation_config.json")
    if args.hf_model and generation.is_file():
        json_object(generation)  # rather now than when a trained model is to answer with it
    if args.model_backend == "transformers":
        check_model(args, checkpoint)
        return
    if args.context_parallel_size > 1 and checkpoint is not None and checkpoint.has_modelopt:
        raise SetupError(
            f"--context-parallel-size {args.context_parallel_size}: {checkpoint.path} is a model converted "
            f"by ModelOpt, whose draft heads need whole documents on every rank; use tensor or pipeline "
            f"parallelism"
        )
    if args.hf_config is not None and not uses_packed_attention(args):
        if RotaryScaling.of(args.hf_config).original_length is not None:
            raise SetupError(
                f"--hf-model {args.hf_model}: rope type {rope_parameters(args.hf_config)['rope_type']} has "
                f"other frequencies for long documents, and Transformer Engine takes one table for all "
                f"documents of a pack; use --transformer-impl local"
            )
    if args.draft is not None and checkpoint is None:
        if args.export_offline_model and args.random_weights:
            raise SetupError(
                "--random-weights: stored features are those of a base with its weights"
            )
        if args.draft_vocab_size and args.skip_train:
            raise SetupError(
                f"--draft-vocab-size {args.draft_vocab_size} --eval-only: which tokens a draft writes "
                f"follows from training data; name a checkpoint by --load, or leave the size out"
            )
    if takes_hf_weights(args, checkpoint):
        check_hf_weights(local_model_folder(args.hf_model), args.hf_config)


def _install_rotary(chunks: list[torch.nn.Module], hf_config: Any) -> list[torch.nn.Module]:
    scaling = None if hf_config is None else RotaryScaling.of(hf_config)
    for chunk in chunks:
        install_rotary(chunk, scaling)
    return chunks


def _install_factors(chunks: list[torch.nn.Module], factors: Factors) -> list[torch.nn.Module]:
    for chunk in chunks:
        install_factors(chunk, factors)
    return chunks


def _move_to_gpu(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Megatron leaves a model on the host with `--use-cpu-initialization`, and where FSDP2 is asked for.

    FSDP2 moves what it wraps, but without training nothing is wrapped.
    """
    for chunk in chunks:
        chunk.cuda()
    return chunks


def _convert_by_modelopt(
    chunks: list[torch.nn.Module], checkpoint: Checkpoint, args: argparse.Namespace
) -> list[torch.nn.Module]:
    """Make of the fresh model what its checkpoint is of; the weights follow later."""
    from modelopt.torch.opt.plugins import restore_sharded_modelopt_state

    folder = str(checkpoint.path)
    if "quantisation" in (checkpoint.manifest or {}).get("origin", {}):
        mend_scales()  # as when it was saved

    if args.draft is None:
        restore_sharded_modelopt_state(chunks, folder)
        return chunks
    with own_layers():
        restore_sharded_modelopt_state(chunks, folder)
    for chunk in chunks:
        install_forward(chunk, DraftSettings.of(args))
    return chunks


def _add_draft(
    chunks: list[torch.nn.Module], args: argparse.Namespace, tokens: torch.Tensor | None
) -> list[torch.nn.Module]:
    """Give the base an untrained draft."""
    shape = DraftShape.of(args.hf_config, args.draft_vocab_size)
    settings = DraftSettings.of(args)
    for chunk in chunks:
        add_draft(chunk, shape, settings, tokens=tokens, seed=args.seed)
        install_forward(chunk, settings)
    return chunks


def _add_adapters(
    chunks: list[torch.nn.Module], args: argparse.Namespace, begins: bool
) -> list[torch.nn.Module]:
    """Freeze the base and put factors beside its matrices; a checkpoint's follow later."""
    targets = chosen_targets(args.hf_config, args.lora)
    folder = args.lora_adapter if begins else None
    for chunk in chunks:
        for parameter in chunk.parameters() if args.fsdp_compute_dtype is not None else ():
            # A frozen base is kept as it is computed.
            parameter.data = parameter.data.to(args.fsdp_compute_dtype)
        add_adapters(
            chunk, targets, dropout=args.lora_dropout or 0.0, seed=args.seed, folder=folder
        )
    return chunks


def _add_teacher(
    chunks: list[torch.nn.Module],
    args: argparse.Namespace,
    knowledge: KnowledgeSettings,
    teacher: Teacher | None,
) -> list[torch.nn.Module]:
    """Put what teaches it beside the model, outside its modules."""
    built = None if teacher is None else build_teacher(teacher, model_config)
    for chunk in chunks:
        install_distiller(chunk, knowledge, args.vocab_size or args.padded_vocab_size, built)
    return chunks


def _fill_weights(
    chunks: list[torch.nn.Module], folder: str, hf_config: Any
) -> list[torch.nn.Module]:
    load_hf_weights(chunks, local_model_folder(folder), hf_config)
    return chunks
