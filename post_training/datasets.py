"""The splits of a run: prepared documents, and the packing plan over them."""

from __future__ import annotations

import argparse
from typing import Any

from data import Documents, SFTDataset
from data.arguments import DataSplit, prepare_documents_from_args
from post_training.errors import SetupError
from post_training.tokenizer import load_tokenizer

SPLITS: tuple[DataSplit, ...] = ("train", "valid", "test")


def prepare_data(args: argparse.Namespace) -> tuple[Any, dict[str, Documents]]:
    """Tokenise and mask every split, before any process group exists.

    Returns:
        The tokenizer, and documents by split; a split without data is left out.
    """
    tokenizer = load_tokenizer(args)
    documents: dict[str, Documents] = {}
    for split in SPLITS:
        prepared = prepare_documents_from_args(args, split, tokenizer)
        if prepared is None:
            continue
        if args.vocab_size is not None and prepared.max_token_id >= args.vocab_size:
            raise SetupError(
                f"the {split} data holds token id {prepared.max_token_id}, the model's vocabulary has "
                f"{args.vocab_size} entries: --hf-tokenizer and --hf-model do not fit together"
            )
        documents[split] = prepared
    if "train" not in documents and not args.skip_train:
        raise SetupError("no training data: give --finetune-data-files or --finetune-hf-dataset")
    return tokenizer, documents


def steps_of_epochs(args: argparse.Namespace, tokenizer: Any, documents: Documents) -> int:
    """Optimizer steps of `--num-epochs`; filler packs, which weigh nothing, make the last one full."""
    plan = packs_of(documents, tokenizer, args, "train", epochs=args.num_epochs)
    return -(-plan.num_packed_samples // args.global_batch_size)


def packs_of(
    documents: Documents, tokenizer: Any, args: argparse.Namespace, split: str, **options: Any
) -> SFTDataset:
    """The packing plan of a split, sharded by `num_shards` and `shard_index` in `options`."""
    if split == "train":
        return SFTDataset(
            options.pop("num_packed_samples", None),
            documents,
            tokenizer,
            args.seq_length,
            seed=args.seed,
            packing=args.packing,
            **options,
        )
    batch = args.eval_global_batch_size or args.global_batch_size
    whole = SFTDataset(
        None, documents, tokenizer, args.seq_length, packing=args.packing, shuffle=False
    )
    # Filler packs make the last batch full; they weigh nothing.
    samples = -(-whole.num_packed_samples // batch) * batch
    return SFTDataset(
        samples,
        documents,
        tokenizer,
        args.seq_length,
        packing=args.packing,
        shuffle=False,
        epochs=1,
        **options,
    )
