"""The flags of distillation: drafts for speculative decoding, and what they learn from."""

from __future__ import annotations

import argparse
from typing import Any

from post_training.errors import SetupError
from post_training.hf.draft import DraftShape, aux_layers


def add_distillation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser."""
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--draft",
        choices=["eagle3"],
        help="train a draft of this kind for the base model, which is frozen",
    )
    group.add_argument(
        "--export-offline-model",
        action="store_true",
        help="train the draft from the features of --offline-distillation-data: the base has no decoder "
        "layers (implies --draft eagle3)",
    )
    group.add_argument(
        "--offline-distillation-data",
        metavar="DIR",
        help="folder of features with train, valid and test, as scripts/extract_features.py writes it; "
        "takes the place of --finetune-data-files",
    )
    group.add_argument(
        "--aux-layers",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="three decoder layers of the base whose output the draft reads, from 0; -1 is the output of "
        "the embedding (default: EAGLE-3's choice)",
    )
    group.add_argument(
        "--draft-vocab-size",
        type=int,
        metavar="N",
        help="the draft writes the N tokens only that the training data trains most often (default: all)",
    )
    group.add_argument(
        "--draft-ttt-steps",
        type=int,
        default=4,
        metavar="N",
        help="test-time training: steps that the draft continues its own (default: 4)",
    )
    group.add_argument(
        "--draft-loss-decay",
        type=float,
        default=0.9,
        metavar="X",
        help="step t of them weighs X to the power of t (default: 0.9)",
    )
    group.add_argument(
        "--draft-detach-steps",
        action="store_true",
        help="no gradient from one step to the one before, as in ModelOpt's own forward",
    )


def complete_distillation(args: argparse.Namespace) -> None:
    """Fill in what follows from these flags, and refuse what a draft cannot be trained with.

    Raises:
        SetupError: a missing or contradictory flag, or a base whose draft no server could read.
    """
    if args.export_offline_model:
        args.draft = "eagle3"
        if not args.offline_distillation_data and not args.skip_train:
            raise SetupError(
                "--export-offline-model: name the features by --offline-distillation-data (written by "
                "scripts/extract_features.py), or train online with --draft eagle3"
            )
    if args.offline_distillation_data:
        for name in (
            "finetune_data_files",
            "finetune_hf_dataset",
            "valid_data_files",
            "test_data_files",
        ):
            if getattr(args, name):
                raise SetupError(
                    f"--{name.replace('_', '-')}: --offline-distillation-data brings its own train, valid "
                    f"and test; leave one of them out"
                )
    if args.draft is None:
        for name in ("aux_layers", "draft_vocab_size", "draft_detach_steps"):
            if getattr(args, name):
                raise SetupError(
                    f"--{name.replace('_', '-')}: there is no draft; add --draft eagle3"
                )
        return
    if args.hf_config is None:
        raise SetupError("--draft: name the base by --hf-model; a draft is stored in its format")
    args.aux_layers = list(aux_layers(args.aux_layers, args.num_layers))
    if args.draft_vocab_size is not None and args.draft_vocab_size >= args.vocab_size:
        args.draft_vocab_size = None
    DraftShape.of(args.hf_config, args.draft_vocab_size)
    if args.draft_vocab_size and args.draft_vocab_size % args.tensor_model_parallel_size:
        raise SetupError(
            f"--draft-vocab-size {args.draft_vocab_size}: not a multiple of "
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}"
        )
    for name, least, why in (
        ("pipeline_model_parallel_size", 1, "a draft reads layers of all stages"),
        ("context_parallel_size", 1, "a draft's steps cross the parts of a document"),
        ("use_torch_fsdp2", False, "a draft is trained with Megatron's distributed optimizer"),
        ("save_hf", False, "export the draft with scripts/export_hf.py"),
        ("hidden_dropout", 0.0, "a draft has none"),
        ("attention_dropout", 0.0, "a draft has none"),
    ):
        if getattr(args, name) != least:
            raise SetupError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: not with --draft: {why}"
            )


def draft_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """What makes the tensors of the run's draft, in the types of JSON; None without one."""
    if args.draft is None:
        return None
    return {
        "kind": args.draft,
        "aux_layers": list(args.aux_layers),
        "vocabulary": args.draft_vocab_size,
        "without_decoder": args.export_offline_model,
    }
