"""`torch_dcp`, the checkpoint format of FSDP2 runs: torch's own, addressed by parameter name."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as read
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from post_training.checkpoint.integrity import METADATA
from post_training.checkpoint.store import Checkpoint
from post_training.errors import SetupError
from post_training.hf.weights import whole_name
from post_training.platform.checkpoints.loading import agreed

MODEL_PREFIX = "model."


def checkpoint_format(checkpoint: Checkpoint) -> str:
    """`torch_dcp` for the checkpoint of an FSDP2 run, `torch_dist` for one of any other layout.

    Its manifest says so; of one without, or of an older version, the files tell.
    """
    origin = (checkpoint.manifest or {}).get("origin", {})
    if "ckpt_format" in origin:
        return str(origin["ckpt_format"])
    path = checkpoint.path
    is_dcp = (path / METADATA).is_file() and not (path / "metadata.json").is_file()
    return "torch_dcp" if is_dcp else "torch_dist"


def check_format(args: argparse.Namespace, checkpoint: Checkpoint, written: dict[str, Any]) -> None:
    """Refuse a checkpoint whose format this layout cannot read.

    Args:
        args: arguments of this run.
        checkpoint: what is to be loaded.
        written: `config.yaml` of the run that wrote it; may be empty.

    Raises:
        SetupError: it is from FSDP2 and this run is not, or the other way round.
    """
    found = checkpoint_format(checkpoint)
    with_fsdp2 = found == "torch_dcp"
    if with_fsdp2 != args.use_torch_fsdp2:
        how = "with" if with_fsdp2 else "without"
        fix = "add it" if with_fsdp2 else "leave it out"
        # Of an adapter's run a whole model would be the merged one.
        adapter = "lora" in (checkpoint.manifest or {}).get("origin", {})
        export, flag = (" --adapter", "--lora-adapter") if adapter else ("", "--hf-model")
        raise SetupError(
            f"{checkpoint.path} was written {how} --use-torch-fsdp2 (format {found}): {fix} to continue; "
            f"or export it with scripts/export_hf.py{export}, and give that folder as {flag} with another "
            f"--output-dir"
        )
    before = written.get("transformer_impl", args.transformer_impl)
    if with_fsdp2 and not args.skip_train and before != args.transformer_impl:
        raise SetupError(
            f"{checkpoint.path} was written with --transformer-impl {before}, here it is "
            f"{args.transformer_impl}: with --use-torch-fsdp2 a run goes on with the same only"
        )


@torch.no_grad()
def load_weights(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Fill a whole model in this process with the weights, and buffers, of a `torch_dcp` checkpoint.

    Args:
        model: an unwrapped model; its weights keep their dtype and device.
        checkpoint: what is to be loaded.

    Raises:
        SetupError: the checkpoint lacks a parameter of the model.
    """
    reader = FileSystemReader(checkpoint.path)
    keys = {
        whole_name(key.removeprefix(MODEL_PREFIX)): key
        for key, value in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(MODEL_PREFIX) and isinstance(value, TensorStorageMetadata)
    }
    state: dict[str, Any] = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        if not isinstance(parameter, torch.Tensor):
            continue
        key = keys.get(whole_name(name))
        if key is None:
            raise SetupError(f"{checkpoint.path} lacks the parameter {name}: it is another model's")
        state[key] = parameter.detach()
    agreed(read)(state, storage_reader=reader, no_dist=True)
