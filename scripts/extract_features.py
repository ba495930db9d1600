r"""Stores what distillation learns from: hidden states of a base model, and its most probable tokens.

torchrun --nproc-per-node 8 scripts/extract_features.py --hf-model BASE --finetune-data-files train.jsonl \
    --valid-data-files valid.jsonl --output-dir FEATURES --tensor-model-parallel-size 2

Takes the data and layout flags of finetune.py. FEATURES/train, valid and test hold documents and
features by document, whatever the layout; the same command goes on after a kill. See docs/distillation.md.
"""

# ruff: noqa: E402 - the platform layer must be in place before Megatron is imported

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from post_training import platform

platform.apply()

import torch
from megatron.training import training
from megatron.training.global_vars import set_global_variables
from tqdm import tqdm

from data import DataError
from data.features.manifest import Field, estimate_bytes, hidden_fields, top_k_fields
from data.features.writer import FeatureWriter, require_room, room_for
from data.prepare.splits import prepare_documents_from_args
from model_provider import check_weights, model_config
from post_training.arguments.completion import complete_run, validate
from post_training.arguments.parser import parse_arguments
from post_training.batch.splits import SPLITS
from post_training.distillation.extraction import Extractor, extract, own_shards, tokens_of
from post_training.distillation.features import made_by
from post_training.errors import SetupError
from post_training.export.hf import DTYPES
from post_training.hf.draft import aux_layers
from post_training.hf.tokenizer import load_tokenizer
from post_training.inference.load import frozen_model
from post_training.inference.quiet import hush, quiet_libraries
from post_training.layout.sizes import describe_layout
from post_training.machine.outcome import note_outcome

REFUSED = (
    ("task", None, "features are made of conversations"),
    ("model_backend", "megatron", "Megatron's layers compute features; leave it out"),
    (
        "lora",
        None,
        "merge the factors first, with scripts/export_hf.py, and extract from that folder",
    ),
    ("context_parallel_size", 1, "a document's hidden states are stored by one rank"),
    ("num_layers_per_virtual_pipeline_stage", None, "stages are not interleaved here"),
    ("num_virtual_stages_per_pipeline_rank", None, "stages are not interleaved here"),
    (
        "use_torch_fsdp2",
        False,
        "use --tensor-model-parallel-size or --pipeline-model-parallel-size",
    ),
    ("load", None, "features are those of --hf-model: export the run with scripts/export_hf.py"),
    ("draft", None, "a base is stored, not a draft"),
    ("random_weights", False, "nothing is to be learned of a base that was not trained"),
    ("export_kd_teacher_load", None, "the teacher is --hf-model"),
    ("offline_distillation_data", None, "features are made of conversations"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    own = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    own.add_argument(
        "--features-dtype", choices=list(DTYPES), default="bf16", help="of what is stored (bf16)"
    )
    own.add_argument(
        "--aux-layers",
        type=int,
        nargs="+",
        help="layers whose output a draft will read, from 0; -1: the embedding's (EAGLE-3's choice)",
    )
    own.add_argument(
        "--top-k",
        type=int,
        help="also store the K most probable tokens, for knowledge distillation",
    )
    own.add_argument(
        "--no-hidden-states",
        action="store_true",
        help="only what --top-k stores: no draft can be trained",
    )
    own.add_argument("--shard-megabytes", type=int, default=512, help="of a file (512)")
    options, rest = own.parse_known_args(argv)
    hush()
    try:
        _extract(options, rest)
    except (SetupError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _extract(options: argparse.Namespace, rest: list[str]) -> None:
    args = parse_arguments([*rest, "--eval-only"])
    if args.only == "check":
        print(describe_layout(args), file=sys.stderr)
        return
    for name, allowed, why in REFUSED:
        if (given := getattr(args, name)) != allowed:
            flag = "--lora-rank" if name == "lora" else f"--{name.replace('_', '-')} {given}"
            raise SetupError(f"{flag}: {why}")
    if args.hf_config is None:
        raise SetupError("--hf-model is missing: features are those of a HuggingFace base")
    if options.no_hidden_states and not options.top_k:
        raise SetupError("--no-hidden-states: nothing is left to store; add --top-k")
    if options.no_hidden_states and options.aux_layers:
        raise SetupError(
            "--aux-layers: --no-hidden-states stores of no layer; leave one of them out"
        )
    if options.top_k is not None and not 1 <= options.top_k <= args.vocab_size:
        raise SetupError(f"--top-k {options.top_k}: the base has {args.vocab_size} tokens")
    if options.shard_megabytes < 1:
        raise SetupError(f"--shard-megabytes {options.shard_megabytes}: must be at least 1")
    layers = (
        [] if options.no_hidden_states else list(aux_layers(options.aux_layers, args.num_layers))
    )
    check_weights(args, None)
    tokenizer = load_tokenizer(args)
    fields: list[Field] = []
    if not options.no_hidden_states:
        fields += hidden_fields(args.hidden_size, options.features_dtype, len(layers))
    if options.top_k:
        fields += top_k_fields(options.top_k, options.features_dtype)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    identity = {**made_by(args, tokenizer), "computed_in": precision, "aux_layers": layers}
    found: dict[str, Any] = {}
    for split in SPLITS:
        documents = prepare_documents_from_args(args, split, tokenizer)
        if documents is None or not len(documents):
            continue
        if int(documents.lengths.max()) > args.seq_length:
            raise DataError(
                f"the {split} data has a document of {int(documents.lengths.max())} tokens: "
                f"--seq-length {args.seq_length} is too short"
            )
        if args.rank == 0:
            size = estimate_bytes(documents, fields) / 2**30
            print(
                f"{split}: {len(documents):,} documents, {int(documents.lengths.sum()):,} tokens; "
                f"{size:.2f} GiB of features",
                file=sys.stderr,
            )
        found[split] = documents
    folder = Path(args.output_dir).absolute()
    require_room(folder, sum(room_for(folder / s, made, fields) for s, made in found.items()))
    splits = {
        name: (
            made,
            FeatureWriter(folder / name, made, fields, identity, options.shard_megabytes << 20),
        )
        for name, made in found.items()
    }
    if not splits:
        raise SetupError(
            "no data: give --finetune-data-files, --valid-data-files or --test-data-files"
        )
    if args.only == "prepare":
        shards = sum(1 for _ in folder.glob("*/*.safetensors"))
        note_outcome("prepared", progress=shards, folder=args.output_dir)
        return
    if all(writer.finished for _, writer in splits.values()):
        for _, writer in splits.values():
            writer.finish()
        if args.rank == 0:
            print(f"{args.output_dir}: all features are there", file=sys.stderr)
            note_outcome("complete")
        return
    with quiet_libraries():
        chunks = _base(args)
    extractor = Extractor(
        args,
        chunks,
        aux_layers=layers,
        dtype=DTYPES[options.features_dtype],
        top_k=options.top_k,
        hidden_states=not options.no_hidden_states,
    )
    for name, (documents, writer) in splits.items():
        total = sum(tokens_of(writer, shard) for shard in own_shards(writer))
        with tqdm(total=total, desc=name, unit=" tokens", disable=args.rank != 0) as bar:
            extract(extractor, writer, documents, bar.update)
    if args.rank == 0:
        print(f"done: features in {args.output_dir}", file=sys.stderr)
        note_outcome("complete")


def _base(args: argparse.Namespace) -> list[torch.nn.Module]:
    """This rank's part of the base model, with its weights."""
    complete_run(args, load=None, ckpt_step=None, finetune=False, by_modelopt=False)
    validate(args)
    set_global_variables(args, build_tokenizer=False)
    training.initialize_megatron()
    return frozen_model(model_config(args, None))[0]


if __name__ == "__main__":
    sys.exit(main())
