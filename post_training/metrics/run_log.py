"""What a run leaves behind beside its checkpoints: `metrics.jsonl`, `report.html` and the progress bar."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from post_training.layout.flops import model_flops, peak_flops
from post_training.machine.device import current_device
from post_training.metrics.progress import Progress
from post_training.metrics.records import read_records, write_start
from post_training.metrics.step_counters import ExpertTotals, StepTotals, counters
from post_training.metrics.trackers import MlflowRun
from post_training.platform.checkpoints.saving import save_hooks
from post_training.platform.training_hooks import Evaluation, Step, TrainStart, hooks

# What Megatron itself writes to TensorBoard, and what is no number to draw.
_LEFT_OUT = {
    *("iteration", "lm_loss", "grad_norm", "lr", "consumed_samples", "total_trained_tokens"),
    *("split", "loss", "tokens", "sources", "model", "skipped"),
}


def _by_source(totals: StepTotals) -> dict[str, dict[str, float | None]]:
    """Mean loss and trained tokens of each source; no loss where nothing of it was trained."""
    return {
        name: {"loss": loss / tokens if tokens else None, "tokens": round(tokens)}
        for name, (loss, tokens) in totals.sources.items()
    }


def _means(named: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in named.items() if count}


class RunLog:
    """Hears of every step and evaluation, and writes them down on rank 0."""

    def __init__(
        self, args: argparse.Namespace, console: TextIO, source_names: Mapping[str, Sequence[str]]
    ) -> None:
        """Register with the training hooks.

        Args:
            args: validated arguments.
            console: where the progress bar is drawn.
            source_names: by split, of the sources whose losses are told apart.
        """
        self.args = args
        self.source_names = source_names
        self.folder = Path(args.output_dir)
        self.is_writer = args.rank == 0
        self.progress = Progress(
            console if self.is_writer else None, args.train_iters or 0, plain=args.no_progress
        )
        self.last_step_end: float | None = None
        self.pause_begin = 0.0
        self.trained_tokens = 0.0
        self.peak = peak_flops()
        self.last_iteration = 0
        self.begun = False
        """Whether the model and its checkpoint are loaded."""
        self._unrecorded: Step | None = None
        self.found: dict[str, float] = {}
        """What an evaluation has found out beside losses, until it is written down."""
        self.mlflow: MlflowRun | None = None
        self.on_validation: list[Callable[[dict[str, Any]], None]] = []
        """Hear of each evaluation on the validation data, on all ranks."""
        if args.num_experts:
            counters.watch_experts(args.num_layers, args.num_experts)
        if args.window_size:
            share = sum(args.window_attn_skip_freq) / args.num_layers
            counters.window = (1 + args.window_size[0], share)
        hooks.on_step.append(self.on_step)
        hooks.on_save_start.append(self.on_save_start)
        hooks.on_save_end.append(self.on_save_end)
        hooks.on_evaluation_start.append(self.on_evaluation_start)
        hooks.on_evaluation_end.append(self.on_evaluation_end)

    @property
    def metrics_file(self) -> Path:
        """`metrics.jsonl` of the run; with `--eval-only` `evaluations.jsonl`, which is not cut back."""
        return self.folder / ("evaluations.jsonl" if self.args.eval_only else "metrics.jsonl")

    def continue_from(self, iteration: int) -> None:
        """Drop what an interrupted run wrote after the checkpoint that this run continues from."""
        self.last_iteration = iteration
        if not self.is_writer or not self.metrics_file.is_file() or self.args.eval_only:
            return
        kept = []
        for line, record in read_records(self.metrics_file):
            if record["iteration"] <= iteration:
                kept.append(line)
                self.trained_tokens = record.get("total_trained_tokens", self.trained_tokens)
        partial = self.metrics_file.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.replace(self.metrics_file)

    def begin(self, iteration: int) -> None:
        """Take over at `iteration`, which a checkpoint holds (0 at the start of a run)."""
        self.begun = True
        self.continue_from(iteration)
        if self.is_writer and not self.args.eval_only:
            if iteration:
                self.progress.message(f"continuing after step {iteration}")
            write_start(self.args, iteration)
            if self.args.mlflow_experiment:
                self.mlflow = MlflowRun(self.args, self.progress.message)
        self.progress.start(iteration)
        self.last_step_end = time.perf_counter()
        self._tell_apart("train")

    def _tell_apart(self, split: str) -> None:
        """Count from zero, for a split."""
        counters.tell_apart(self.source_names.get(split, ()))

    def start_clock(self, start: TrainStart) -> None:
        """Time the first step from here: what is checked before it is no part of it."""
        self.last_step_end = time.perf_counter()

    def on_step(self, step: Step) -> None:
        """Write one record every `--log-interval` steps, of all of them; all ranks take part."""
        self.last_iteration = step.iteration
        self._unrecorded = step
        if step.iteration % self.args.log_interval == 0 or step.iteration == self.args.train_iters:
            self._record()

    def _record(self) -> None:
        """Write down the steps since the last record, if there are any; all ranks take part.

        Also before a save, so that a run that goes on from there has lost no step's tokens, and before
        an evaluation, which counts from zero.
        """
        step, self._unrecorded = self._unrecorded, None
        if step is None:
            return
        totals = counters.reduce(current_device())
        self._write_sources(totals, "lm loss", step.iteration)
        now = time.perf_counter()
        seconds = now - (self.last_step_end if self.last_step_end is not None else now)
        self.last_step_end = now
        self.trained_tokens += totals.trained_tokens
        steps = max(1, self.progress.steps_since(step.iteration))
        positions = steps * self.args.global_batch_size * self.args.seq_length
        if self.args.task is not None:  # whose rows have no fixed length
            positions = totals.real_tokens
        record: dict[str, Any] = {
            "iteration": step.iteration,
            "consumed_samples": self.args.consumed_train_samples,
            "lm_loss": totals.loss,
            # Megatron says 0 where nothing is clipped: it has measured nothing.
            "grad_norm": float(step.grad_norm) if step.grad_norm and self.args.clip_grad else None,
            "lr": step.learning_rate,
            "token_accuracy": totals.accuracy,
            "trained_tokens": round(totals.trained_tokens),
            "total_trained_tokens": round(self.trained_tokens),
            "tokens_per_s": positions / seconds if seconds else None,
            "real_tokens_per_s": totals.real_tokens / seconds if seconds else None,
            "data_wait_fraction": totals.data_seconds / seconds if seconds else None,
            "step_seconds": seconds / steps,
        }
        if totals.sources:
            record["sources"] = _by_source(totals)
        record |= totals.parts
        record |= _means(totals.named)
        record |= self._routing(totals.experts)
        if step.skipped:
            record["skipped"] = True
        # The count is that of a whole model of Megatron's layers.
        counted = self.args.draft is None and self.args.model_backend == "megatron"
        if self.peak and seconds and counted:
            peak = seconds * self.args.world_size * self.peak
            record["mfu"] = (
                model_flops(
                    self.args,
                    real_tokens=totals.real_tokens,
                    trained_tokens=totals.trained_tokens,
                    squared_lengths=totals.squared_lengths,
                )
                / peak
            )
        # Every rank has the same sums; TensorBoard's writer is not on the rank that writes the file.
        self._write(record)
        self.progress.step(record)
        if self.args.task is not None and not totals.trained_tokens:
            self.progress.message(
                f"step {step.iteration}: nothing was trained, no micro batch had a label or a count"
            )

    def _routing(self, experts: ExpertTotals | None) -> dict[str, float]:
        """What became of the tokens in layers with experts, for the log."""
        if experts is None:
            return {}
        imbalance = experts.imbalance
        record = {
            "expert_imbalance": float(imbalance.mean()),
            "expert_imbalance_worst_layer": float(imbalance.max()),
            "idle_experts": experts.idle,
        }
        if self.args.moe_aux_loss_coeff:
            record["moe_aux_loss"] = experts.auxiliary_loss
        return record

    def on_save_start(self, iteration: int) -> None:
        """Write down the steps that the checkpoint holds."""
        self._record()
        self.pause_begin = time.perf_counter()

    def on_save_end(self, iteration: int) -> None:
        """Write down how long training waited for the checkpoint, if one was written."""
        pause = self._pause()
        if not save_hooks.there_already:
            self._write({"iteration": iteration, "save_seconds": pause})

    def _pause(self) -> float:
        """Seconds since `pause_begin`, which are no part of a step's."""
        pause = time.perf_counter() - self.pause_begin
        if self.last_step_end is not None:
            self.last_step_end += pause
        return pause

    def on_evaluation_start(self, split: str) -> None:
        """Count the evaluation's tokens apart from training's."""
        self._record()
        self.pause_begin = time.perf_counter()
        self._tell_apart(split)
        self.progress.note(f"evaluating on {split}")

    def on_evaluation_end(self, evaluation: Evaluation) -> None:
        """Write one evaluation down; all ranks take part."""
        totals = counters.reduce(current_device())
        self._tell_apart("train")
        self._write_sources(totals, f"lm loss {evaluation.split}", evaluation.iteration)
        pause = self._pause()
        record: dict[str, Any] = {
            "iteration": evaluation.iteration,
            "split": evaluation.split,
            "loss": totals.loss,
            "token_accuracy": totals.accuracy,
            "tokens": round(totals.trained_tokens),
            "seconds": pause,
            **totals.parts,
        }
        if self.args.draft is None:  # whose loss is no cross-entropy
            record["perplexity"] = math.exp(min(totals.loss, 700.0))
        if self.args.task is not None:
            # A task counts what is right; it computes no loss.
            for name in ("loss", "token_accuracy", "tokens", "perplexity"):
                record.pop(name, None)
            record |= _means(totals.named)
            right, total = totals.named.get("eval_accuracy", (0.0, 0.0))
            record |= {"correct": right, "total": total}
            if not total:
                self.progress.message(
                    f"step {evaluation.iteration}: get_eval_model_output counted nothing of "
                    f"{evaluation.split}: there is no eval_accuracy"
                )
        if totals.sources:
            record["sources"] = _by_source(totals)
        if self.args.eval_only:
            record["model"] = self.args.load or self.args.hf_model
        record |= self.found
        self.found = {}
        self._write(record)
        self.progress.evaluation(record)
        if evaluation.split == "valid":
            for listener in self.on_validation:
                listener(record)

    def _write_sources(self, totals: StepTotals, title: str, iteration: int) -> None:
        """Losses of each source for TensorBoard, whose writer Megatron has on the last rank."""
        from megatron.training.global_vars import get_tensorboard_writer

        writer = get_tensorboard_writer()
        for name, (loss, tokens) in totals.sources.items() if writer else ():
            if tokens:
                writer.add_scalar(f"{title}/{name}", loss / tokens, iteration)

    def _write(self, record: dict[str, Any]) -> None:
        """Add a record to the file, on the rank that has it, and to Megatron's writers, where they are."""
        clean = {
            k: (None if isinstance(v, float) and not math.isfinite(v) else v)
            for k, v in record.items()
        }
        self._to_tensorboard(clean)
        if self.is_writer:
            # One write a line, so that a reader never sees half of one.
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(clean) + "\n")
            if self.mlflow is not None:
                split = f" {clean['split']}" if "split" in clean else ""
                values = {f"{name}{split}": value for name, value in clean.items()}
                self.mlflow.log(values, record["iteration"])

    def _to_tensorboard(self, record: dict[str, Any]) -> None:
        """Add a record's numbers to Megatron's own writers, which are open on its last rank only."""
        from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

        split = record.get("split")
        values = {
            f"{name} {split}" if split else name: value
            for name, value in record.items()
            if name not in _LEFT_OUT and value is not None
        }
        if (writer := get_tensorboard_writer()) is not None:
            for name, value in values.items():
                writer.add_scalar(name.replace("_", "-"), value, record["iteration"])
        if values and (wandb := get_wandb_writer()):
            wandb.log(values, record["iteration"])

    def finish(self) -> None:
        """Close the progress bar and the trackers, and write `report.html`."""
        ending = sys.exception()
        self.progress.close()
        if self.mlflow is not None:
            self.mlflow.finish(failed=isinstance(ending, Exception))
        if self.is_writer and self.metrics_file.is_file() and not self.args.eval_only:
            from post_training.metrics.report import write_report

            try:
                write_report(self.folder, self.folder / "report.html")
            except OSError as error:
                # An error that ends the run, such as a full disk, is told by itself.
                if ending is None:
                    self.progress.message(f"report.html is not written: {error.strerror}")
