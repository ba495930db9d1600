"""What features a run makes or takes, and what they depend on."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.documents.check_sum import check_sum
from data.features.dataset import OfflineDataset, open_features
from data.features.manifest import DTYPES
from data.features.mixture import parts_of
from data.features.reader import Features
from data.prepare.splits import parse_weighted
from data.templates.tokenizer_facts import template_source
from post_training.batch.splits import SPLITS, Split
from post_training.checkpoint.origin import origin
from post_training.errors import SetupError
from post_training.hf.checkpoint import HFCheckpoint
from post_training.hf.folder import local_model_folder, local_tokenizer_folder
from post_training.hf.tokenizer import FILE

OF_DRAFT = ("aux_hidden_states", "hidden_states")
OF_STUDENT = ("topk_ids", "topk_logprobs", "rest_logprobs")


def made_by(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """What decides about a base model's features, beside documents, layers and precision, by name.

    Weights, tokenizer and template are hashes; the architecture is what this project reads of config.json.

    Args:
        args: resolved arguments.
        tokenizer: the run's.
    """
    weights = sorted(local_model_folder(args.hf_model).glob("*.safetensors"))
    sums = [(file.stat().st_size, check_sum(file)) for file in weights]
    architecture: dict[str, Any] = origin(args)["architecture"]
    architecture.pop("draft")
    return {
        "base": _short(json.dumps(sums).encode()),
        "architecture": architecture,
        **_text_made_by(args, tokenizer),
    }


def _text_made_by(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    files = local_tokenizer_folder(args.hf_tokenizer or args.hf_model)
    return {
        "tokenizer": _short((files / FILE).read_bytes()),
        "template": _short(template_source(tokenizer, args.chat_template).encode()),
    }


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def wanted_features(tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What stored features must have been made by, for a run to learn from them."""
    if not args.export_offline_model:  # of any teacher with the same tokens and conversations
        return _text_made_by(args, tokenizer)
    return {
        **made_by(args, tokenizer),
        "aux_layers": list(args.aux_layers),
        "hidden_size": args.hidden_size,
        "aux_hidden_size": len(args.aux_layers) * args.hidden_size,
    }


def check_stored(args: argparse.Namespace, splits: Mapping[str, Split]) -> None:
    """Refuse stored features before the first step would trip over them.

    Raises:
        SetupError: naming the folder.
    """
    stored_features(args)
    for split in splits.values():
        if isinstance(split.packs, OfflineDataset):
            check_states(split.packs.features, args)


def check_states(features: Features, args: argparse.Namespace) -> None:
    """Look at stored states whose folder does not say what made them: the base leaves marks.

    Behind an RMS norm states over its weights have a mean square of 1, and where the embedding is one of
    the auxiliary layers, its rows stand at the ids. Eight documents are looked at.

    Raises:
        SetupError: they are those of another base, tokenizer or place.
    """
    if not args.export_offline_model:
        return
    with HFCheckpoint(local_model_folder(args.hf_model)) as base:
        for part in parts_of(features):
            if part.made_by is None:
                _check_states(part, args, base)


def _check_states(features: Features, args: argparse.Namespace, base: HFCheckpoint) -> None:
    flag = f"--offline-distillation-data {features.folder}: document"
    count = len(features.documents)
    scale = base.slice("model.norm.weight")[:].float()
    kept = scale.abs() > 1e-3 * scale.abs().max()
    for number in sorted({count * part // 8 for part in range(8)}):
        rows = {name: states[:64].float() for name, states in features.read(number).items()}
        square = float((rows["hidden_states"] / scale)[:, kept].square().mean())
        if not 0.9 < square < 1.1:
            raise SetupError(
                f"{flag} {number}: hidden_states are not those behind the final norm of "
                f"{args.hf_model} (mean square over its weights {square:.3g}, not 1)"
            )
        if args.aux_layers[0] >= 0:
            continue
        table = base.slice("model.embed_tokens.weight")
        ids = features.documents[number][0][:64].tolist()
        wanted = torch.cat([table[token : token + 1] for token in ids]).float()
        found = rows["aux_hidden_states"][:, : args.hidden_size]
        if not (found - wanted).norm() <= 0.02 * wanted.norm():
            raise SetupError(
                f"{flag} {number}: aux_hidden_states do not begin with the embedding of its tokens by "
                f"{args.hf_model}: another base, tokenizer or --aux-layers"
            )


def stored_names(args: argparse.Namespace) -> tuple[str, ...]:
    """The fields of stored features that the packs of a run carry.

    Raises:
        SetupError: the base has no decoder layers, and no features are named.
    """
    if args.offline_distillation_data is None:
        if args.export_offline_model:
            raise SetupError(
                "--export-offline-model: without decoder layers documents have no features; name them by "
                "--offline-distillation-data, or use --draft eagle3"
            )
        return ()
    if args.draft is None:
        return OF_STUDENT
    return OF_DRAFT if args.export_offline_model else ()


def stored_features(args: argparse.Namespace) -> dict[str, tuple[int, torch.dtype]]:
    """Width and dtype of each feature that the packs of a run carry, by name.

    Raises:
        SetupError: the splits' differ, of which every rank is to know what it is sent.
    """
    names = stored_names(args)
    splits = SPLITS[1:] if args.skip_train else SPLITS
    folders = tuple(path for path, _ in parse_weighted(args.offline_distillation_data or ()))
    return _kinds(folders, names, splits) if names else {}


@functools.cache
def _kinds(
    folders: tuple[str, ...], names: tuple[str, ...], splits: tuple[str, ...]
) -> dict[str, tuple[int, torch.dtype]]:
    found: dict[str, tuple[int, torch.dtype]] = {}
    for split, folder in product(splits, folders):
        if not (Path(folder) / split).is_dir():
            continue
        fields = open_features(Path(folder) / split).fields
        kinds = {name: (fields[name].width, DTYPES[fields[name].dtype]) for name in names}
        if found and kinds != found:
            raise SetupError(
                f"--offline-distillation-data {folder}: the features of {split} have another width or "
                f"dtype than those of the splits before: {kinds}, {found}; extract them alike"
            )
        found = kinds
    return found


def draft_tokens(args: argparse.Namespace, splits: Mapping[str, Split]) -> Tensor | None:
    """The tokens that a new draft can write: int64 [draft vocabulary], ascending; None: all."""
    if args.draft is None or args.draft_vocab_size is None or "train" not in splits:
        return None
    documents = splits["train"].documents
    return most_trained_tokens(documents, args.draft_vocab_size, args.vocab_size)


def most_trained_tokens(documents: Any, count: int, vocabulary: int) -> Tensor:
    """Those trained most often, of equally frequent ones the lower: int64 [count], ascending."""
    totals = np.zeros(vocabulary, np.int64)
    for index in range(len(documents)):
        ids, mask = documents[index]
        np.add.at(totals, ids[mask > 0], 1)
    order = np.argsort(-totals, kind="stable")[:count]
    return torch.from_numpy(np.sort(order))
