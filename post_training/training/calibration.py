"""Quantises a run's model before its first step, and says what that costs and what training gives back.

Scales of inputs are measured on the first whole global batches of the plan: the same packs on every
layout, so that scales are the same too. A run that goes on has its scales from the checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from data import SFTDataset
from post_training.batch.iterators import MicroBatchIterator
from post_training.errors import SetupError
from post_training.machine.device import current_device
from post_training.metrics.records import QUANTISATION
from post_training.platform.modelopt_quantisation import mend_scales
from post_training.platform.training_hooks import TrainStart
from post_training.training.trial import ForwardStep, trial_losses, undisturbed


def calibration_packs(packs: SFTDataset, documents: int, batch: int) -> tuple[int, int]:
    """How many packs of the plan's beginning hold so many documents, in whole global batches.

    Args:
        packs: the plan, over all shards.
        documents: wanted; all of them where there are fewer.
        batch: packs in a global batch.

    Returns:
        Packs, and the documents in them.
    """
    found = number = 0
    documents = min(documents, len(packs.documents))  # the plan of a training goes on for ever
    while found < documents:
        held = sum(len(packs.document_indices(number + i)) for i in range(batch))
        if not held:
            break
        found, number = found + held, number + batch
    return number, found


class Calibration:
    """The calibration data of a run that `--export-quant-cfg` quantises."""

    def __init__(
        self,
        args: argparse.Namespace,
        packs: SFTDataset,
        forward_step: ForwardStep,
        say: Callable[[str], None],
        *,
        quantised: bool,
    ) -> None:
        """Choose the packs.

        Args:
            args: validated arguments.
            packs: the plan to take them from, over all shards.
            forward_step: the run's own.
            say: tells the user, on rank 0.
            quantised: the checkpoint's model is quantised already.

        Raises:
            SetupError: a global batch is no whole number of micro batches of an evaluation.
        """
        self.args, self.packs, self.forward_step, self.say = args, packs, forward_step, say
        self.quantised = quantised
        self.model: list[torch.nn.Module] = []
        self.count, self.documents = calibration_packs(
            packs, args.calib_size, args.global_batch_size
        )
        together = args.eval_micro_batch_size * args.data_parallel_size
        if args.global_batch_size % together:
            raise SetupError(
                f"--eval-micro-batch-size {args.eval_micro_batch_size}: a global batch of "
                f"{args.global_batch_size} packs is no multiple of {together}"
            )

    def begin(self, start: TrainStart) -> None:
        """Quantise the model, unless it is; every rank must call it."""
        self.model = start.model
        if self.quantised:
            return
        import modelopt.torch.quantization as mtq

        mend_scales()
        settings, began = self.args.quantisation, time.perf_counter()
        (chunk,) = unwrap_model(self.model)
        before = self.loss()
        with undisturbed(self.model):
            mtq.quantize(chunk, copy.deepcopy(dict(settings.config)), lambda model: self._forward())
        after = self.loss()
        self._report({"format": settings.name, **self._data(), "before": before})
        self._report({"quantised": after})
        self.say(
            f"quantised by {settings.name} in {time.perf_counter() - began:.1f} s: loss of "
            f"{self.documents:,} documents {before:.4f} -> {after:.4f}"
        )

    def end(self) -> None:
        """Say what training gave back, where there was any; every rank must call it."""
        if not self.model:
            return
        after = self.loss()
        if self.args.rank != 0:
            return
        text = f"quantised: loss of the {self.documents:,} documents of calibration now {after:.4f}"
        if self._known().items() >= self._data().items():
            self._report({"trained": after})
        else:
            text += "; the model was quantised by others, so that the losses do not compare"
        self.say(text)

    def loss(self) -> float:
        """Mean loss of a trained token of the calibration data, the same on all ranks."""
        with undisturbed(self.model):
            found = self._forward()
        sums = torch.zeros(2, dtype=torch.float64, device=current_device())
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for losses, _ in found:
                sums += torch.stack(
                    [losses.sum().double(), losses.new_tensor(len(losses)).double()]
                )
        torch.distributed.all_reduce(sums)
        return float(sums[0] / sums[1])

    def _forward(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        shards, shard = (
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_data_parallel_rank(),
        )
        micro = self.args.eval_micro_batch_size
        data: Any = None
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            own = self.packs.shard(shards, shard, num_packed_samples=self.count)
            data = MicroBatchIterator(own, micro)
        count = self.count // (shards * micro)
        return trial_losses(self.model, data, count, self._told, self.args)

    def _told(self, iterator: Any, chunk: torch.nn.Module) -> Any:
        """The run's own forward step; of one with a teacher the cross-entropies, not what is trained."""
        output, loss = self.forward_step(iterator, chunk)
        reported = loss.keywords["reported"]  # type: ignore[attr-defined]
        return output if reported is None else reported, loss

    def _data(self) -> dict[str, Any]:
        return {"documents": self.documents, "contents": self.packs.documents.contents}

    def _known(self) -> dict[str, Any]:
        """What has been reported; a run that an earlier version began does not say its contents."""
        file = Path(self.args.output_dir) / QUANTISATION
        known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        return {"contents": self.packs.documents.contents} | known

    def _report(self, more: dict[str, Any]) -> None:
        if self.args.rank != 0:
            return
        known = self._known() if "before" not in more else {}
        file = Path(self.args.output_dir) / QUANTISATION
        file.write_text(json.dumps(known | more, indent=1) + "\n")
