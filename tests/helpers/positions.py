"""Checkpoints that say where in the data they were saved."""

import argparse
import json

from post_training.batch.splits import plan_split
from post_training.checkpoint import store
from post_training.checkpoint.position import find_position
from tests.helpers.models import make_tokenizer


def position_of(args: argparse.Namespace, documents, checkpoint=None, teaching=None):
    found = checkpoint and store.Checkpoint.at(checkpoint)
    train = plan_split(args, "train", documents, make_tokenizer())
    return find_position(args, train, found, teaching)


def begins_at(args: argparse.Namespace, documents, checkpoint):
    """Consumed packs at which a run that continues from `checkpoint` begins its data."""
    return position_of(args, documents, checkpoint).begins_at


def make_checkpoint(folder, iteration=5, facts=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = store.begin_save(folder, iteration)
    (path / "__0_0.distcp").write_bytes(b"weights")
    store.finish_save(folder, iteration, facts or {})
    return path


def manifest_of(checkpoint):
    return json.loads((checkpoint / store.MANIFEST).read_text())


SEQ = ("--seq-length", "192")
