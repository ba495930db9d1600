"""The other sides of `train_step.py`, each run as a process of its own: a plain PyTorch loop, and TRL.

    python benchmarks/train_step_peers.py plain OPTIONS.json        (under torchrun: data parallel)
    python benchmarks/train_step_peers.py trl-padded OPTIONS.json
    python benchmarks/train_step_peers.py trl-packed OPTIONS.json

Prints one JSON object a step on stdout: lm_loss, seconds, real_tokens, trained_tokens.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from trl_rows import TEMPLATE, dataset_of

from data import SFTDataset, prepare_documents
from post_training.hf.tokenizer import open_tokenizer


def tell(loss: float, seconds: float, real: float, trained: float) -> None:
    """Print one step."""
    record = {"lm_loss": loss, "seconds": seconds, "real_tokens": real, "trained_tokens": trained}
    print(json.dumps(record), flush=True)


def plain(options: dict[str, Any]) -> None:
    """What a careful user writes with torch and transformers.

    Packs with reset positions (transformers isolates documents by them), cross-entropy of every token
    with a label mask, AdamW, exact clipping; on several processes DistributedDataParallel.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    tokenizer = open_tokenizer(options["model"], "model")
    batch, micro = options["batch"], options["micro"]
    packs = SFTDataset(
        batch * options["iterations"],
        prepare_documents(
            files=[options["data"]],
            tokenizer=tokenizer,
            seq_length=options["seq_length"],
            cache_dir=options["cache"],
        ),
        tokenizer,
        options["seq_length"],
        global_batch_size=batch,
    )
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32).train()
    wrapped: Any = model
    if world > 1:
        torch.distributed.init_process_group("gloo")
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options["lr"], betas=(0.9, 0.95), weight_decay=0.0
    )
    for step in range(options["iterations"]):
        begin = time.perf_counter()
        optimizer.zero_grad()
        rows = [packs[step * batch + i] for i in range(batch)]
        fields = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        labels = fields["input_ids"].roll(-1, 1)
        same = fields["position_ids"].roll(-1, 1) != 0
        labels[~((fields["loss_mask"].roll(-1, 1) == 1) & same)] = -100
        count = (labels != -100).sum()
        total = 0.0
        mine = list(range(rank * micro, batch, world * micro))
        for first in mine:
            part = slice(first, first + micro)
            # Gradients meet once a step, after its last micro batch.
            wrapped.require_backward_grad_sync = first == mine[-1]
            logits = wrapped(
                input_ids=fields["input_ids"][part],
                position_ids=fields["position_ids"][part],
                use_cache=False,
            ).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[part].flatten(), reduction="sum"
            )
            (loss * world / count).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds = time.perf_counter() - begin
        if world > 1:
            summed = torch.tensor(total)
            torch.distributed.all_reduce(summed)
            total = summed.item()
        if rank == 0:
            real = int(fields["document_lengths"].sum())
            tell(total / int(count), seconds, real, int(count))
    if world > 1:
        # A rank that leaves early keeps gloo's threads of the other waiting.
        torch.distributed.barrier()
        sys.stdout.flush()
        os._exit(0)


class _StepEnd(TrainerCallback):
    """Tells of a step of TRL when it has ended."""

    def __init__(self) -> None:
        self.begin = self.real = self.trained = 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by the trainer after the optimizer's step."""
        tell(float("nan"), time.perf_counter() - self.begin, self.real, self.trained)


def trl(options: dict[str, Any], *, packing: bool) -> None:
    """TRL's SFTTrainer with `assistant_only_loss`, as its documentation shows it."""
    from trl import SFTConfig, SFTTrainer

    steps = _StepEnd()

    class Counting(SFTTrainer):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            """The micro batches of a step, with which it begins."""
            steps.begin = time.perf_counter()
            result = super().get_batch_samples(*args, **kwargs)
            # Packed rows have no attention mask, and no padding.
            masks = [micro.get("attention_mask", micro["labels"] * 0 + 1) for micro in result[0]]
            steps.real = sum(float(mask.sum()) for mask in masks)
            steps.trained = sum(float((micro["labels"] != -100).sum()) for micro in result[0])
            return result

    tokenizer = open_tokenizer(options["model"], "model")
    tokenizer.chat_template = TEMPLATE
    with tempfile.TemporaryDirectory() as folder:
        # Without packing as many rows a batch as a pack holds on average.
        micro = options["micro"] if packing else options["micro"] * options["rows_per_pack"]
        settings = SFTConfig(
            output_dir=folder,
            assistant_only_loss=True,
            packing=packing,
            max_length=options["seq_length"],
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=options["batch"] // options["micro"],
            max_steps=options["iterations"],
            learning_rate=options["lr"],
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Counting(
            model=AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32),
            args=settings,
            train_dataset=dataset_of(Path(options["data"])),
            processing_class=tokenizer,
            callbacks=[steps],
        )
        trainer.train()


def main() -> None:
    """Entry point."""
    what, file = sys.argv[1:]
    options = json.loads(Path(file).read_text())
    torch.set_num_threads(options["threads"])
    if what == "plain":
        plain(options)
    else:
        trl(options, packing=what == "trl-packed")


if __name__ == "__main__":
    main()
