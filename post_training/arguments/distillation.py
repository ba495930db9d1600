"""The flags of distillation: drafts for speculative decoding, and what they learn from."""

from __future__ import annotations

import argparse
from typing import Any

from data.arguments import add_data_arguments
from post_training.errors import SetupError
from post_training.hf.draft import DraftShape, aux_layers
from post_training.layout.pipeline import virtual_stages

# Flags of data that have their use where documents are stored: packs, and prompts of the template later.
_OF_STORED = {
    *("packing", "data_cache_dir", "data_workers"),
    *("chat_template", "chat_template_variables", "template_date"),
}


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
        nargs="+",
        metavar="DIR",
        help="folder of features with train, valid and test, as scripts/extract_features.py writes it; or "
        "several, all or none of them as DIR=WEIGHT for a mixture of their training data; takes the place "
        "of --finetune-data-files",
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
        metavar="N",
        help="test-time training: steps that the draft continues its own (default: 4)",
    )
    group.add_argument(
        "--draft-loss-decay",
        type=float,
        metavar="X",
        help="step t of them weighs X to the power of t (default: 0.9)",
    )
    group.add_argument(
        "--draft-detach-steps",
        action="store_true",
        help="no gradient from one step to the one before, as in ModelOpt's own forward",
    )
    for flag, metavar, text in (
        (
            "--export-kd-teacher-load",
            "DIR",
            "train with this frozen teacher: a HuggingFace folder or hub name, a run's output folder or "
            "one of its checkpoints",
        ),
        (
            "--export-kd-cfg",
            "FILE.yaml",
            "what is learned of the teacher: keys of ModelOpt's DistillationConfig (docs/distillation.md)",
        ),
        ("--export-kd-teacher-model-config", "FILE", "not needed: the teacher's folder says it"),
        ("--export-kd-teacher-ckpt-format", "FORMAT", "not needed: the teacher's folder says it"),
    ):
        group.add_argument(flag, metavar=metavar, help=text)


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
        flags = add_data_arguments(argparse.ArgumentParser())
        for name in sorted(vars(flags.parse_args([])).keys() - _OF_STORED) + ["calib_dataset"]:
            if getattr(args, name) != flags.get_default(name):
                raise SetupError(
                    f"--{name.replace('_', '-')}: --offline-distillation-data brings its own train, valid "
                    f"and test, whose documents are made; leave one of them out"
                )
    _complete_knowledge(args)
    if args.draft is None:
        for name in (
            *("aux_layers", "draft_vocab_size", "draft_detach_steps"),
            *("draft_ttt_steps", "draft_loss_decay"),
        ):
            value = getattr(args, name)
            if value is not None and value is not False:  # a decay of 0 is given, too
                raise SetupError(
                    f"--{name.replace('_', '-')}: there is no draft; add --draft eagle3"
                )
        return
    if args.hf_config is None:
        raise SetupError("--draft: name the base by --hf-model; a draft is stored in its format")
    if args.draft_ttt_steps is None:
        args.draft_ttt_steps = 4
    if args.draft_loss_decay is None:
        args.draft_loss_decay = 0.9
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


def _complete_knowledge(args: argparse.Namespace) -> None:
    """Refuse what a student cannot be taught with.

    Raises:
        SetupError: naming the flag.
    """
    for name, instead in (
        (
            "model_config",
            "config.json or config.yaml in the teacher's folder says what model it is",
        ),
        ("ckpt_format", "the format is seen in the teacher's folder"),
    ):
        if getattr(args, f"export_kd_teacher_{name}") is not None:
            raise SetupError(
                f"--export-kd-teacher-{name.replace('_', '-')}: leave it out: {instead}"
            )
    online = args.export_kd_teacher_load is not None
    if online and args.draft is not None:
        raise SetupError("--export-kd-teacher-load: a draft's teacher is its base, --hf-model")
    if online and args.offline_distillation_data:
        raise SetupError(
            "--export-kd-teacher-load and --offline-distillation-data: the teacher is either at hand or "
            "stored; leave one of them out"
        )
    if args.export_kd_cfg is not None:
        if args.draft is not None:
            raise SetupError(
                "--export-kd-cfg: not with --draft, whose weights are --draft-loss-decay"
            )
        if not (online or args.offline_distillation_data):
            raise SetupError("--export-kd-cfg: name a teacher by --export-kd-teacher-load")
    if online:
        flag = "--export-kd-teacher-load"
        if virtual_stages(args) > 1:
            raise SetupError(
                f"{flag}: the interleaved schedule sends messages of one model's shape only; leave out "
                f"virtual pipeline stages"
            )
        if args.use_torch_fsdp2:
            raise SetupError(
                f"{flag}: --use-torch-fsdp2 cuts the student only; use the distributed optimizer"
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
