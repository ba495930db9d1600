# ruff: noqa: E402 - the platform layer must be in place before Megatron is imported
"""Supervised finetuning through Megatron's `pretrain()`: `torchrun finetune.py --hf-model ... `.

The same command runs on one CPU, one GPU and a cluster. See README.md, or `finetune.py --help`.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

# Ctrl-C during the imports ends the process by the signal, without a traceback; `main` answers it then.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from post_training.arguments.usage import announce
from post_training.machine import processes as processes  # knows its launcher while that is there

if __name__ == "__main__":
    announce(sys.argv[1:])

# What imports make stays: looking for garbage among it takes a tenth of their time, and later of each look.
gc.disable()

from post_training import platform
from post_training.arguments.command_line import CommandLine
from post_training.machine import environment

COMMAND = CommandLine(sys.argv[1:])
environment.choose(COMMAND.asks_for_fsdp2())
platform.apply()

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.utils import unwrap_model
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.global_vars import set_global_variables

from data import DataError, SFTDataset
from model_provider import check_weights, model_config
from post_training.adapters.settings import describe_adapter
from post_training.arguments.completion import complete_run, keep_date, validate
from post_training.arguments.parser import parse_arguments
from post_training.batch.assemble import Batch, join_stage_input, read_batch, split_stage_output
from post_training.batch.data_report import describe
from post_training.batch.iterators import split_iterators
from post_training.batch.splits import (
    Split,
    calibration_data,
    check_same_documents,
    evaluation_batches,
    first_prompts,
    prepare_data,
    template_date,
)
from post_training.checkpoint import resume
from post_training.checkpoint.position import DataPosition, find_position
from post_training.checkpoint.saver import CheckpointSaver
from post_training.distillation.acceptance import report_acceptance
from post_training.distillation.draft_forward import part_names
from post_training.distillation.features import (
    check_stored,
    draft_tokens,
    stored_features,
    stored_names,
    wanted_features,
)
from post_training.errors import RunStopped, SetupError, tell
from post_training.hf.tokenizer import load_tokenizer
from post_training.inference.answering import Answering
from post_training.job import output, run_lock
from post_training.job.finish import ending_together, report_end
from post_training.job.signals import GracefulExit, interrupt, raise_if_interrupted
from post_training.job.watchdog import tell_failure, watchdog
from post_training.knowledge.distiller import Distiller, knowledge_parts
from post_training.knowledge.settings import check_pairs, knowledge_settings
from post_training.knowledge.teacher import Teacher, choose_teacher
from post_training.knowledge.teaching import teaching
from post_training.layout.sizes import describe_layout
from post_training.machine.device import current_device
from post_training.machine.disk import no_room, tell_no_room
from post_training.machine.outcome import note_outcome
from post_training.metrics.records import DATA_REPORT
from post_training.metrics.run_log import RunLog
from post_training.metrics.step_counters import counters
from post_training.metrics.trackers import continue_wandb
from post_training.model.layer_spec import uses_packed_attention
from post_training.platform.checkpoints import writer_queue
from post_training.platform.training_hooks import hooks
from post_training.tasks.model import task_model_config
from post_training.tasks.rows import TaskRows, describe_rows, row_iterators, task_splits
from post_training.tasks.step import TaskStep
from post_training.tasks.task import load_task
from post_training.training.calibration import Calibration
from post_training.training.early_stopping import EarlyStopping
from post_training.training.loss import loss_func, trained_token_loss
from post_training.training.safeguards import install_safeguards

gc.freeze()
gc.enable()

# Exports a run to HuggingFace, as a command.
EXPORTER = Path(__file__).resolve().parent / "scripts" / "export_hf.py"


def train_valid_test_sft_datasets_provider(
    num_samples: Sequence[int],
    vp_stage: int | None = None,
    *,
    args: argparse.Namespace,
    splits: dict[str, Split],
    rows: dict[str, TaskRows] | None = None,
) -> tuple[Any, ...]:
    """Iterators over this data parallel rank's micro batches of each split.

    Args:
        num_samples: packs that Megatron wants of train, valid and test.
        vp_stage: virtual pipeline stage, each of which reads the same data.
        args: validated arguments.
        splits: by name, planned.
        rows: those of a task's splits.

    Returns:
        An iterator or None for train, valid and test; None on all but tensor parallel rank 0.
    """
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return None, None, None  # `get_batch` broadcasts
    shard = {
        "num_shards": parallel_state.get_data_parallel_world_size(),
        "shard_index": parallel_state.get_data_parallel_rank(),
    }
    if rows is not None:
        return row_iterators(num_samples, args, splits, rows, **shard)
    return split_iterators(num_samples, args, splits, **shard)


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]] | None, *, training: bool) -> Batch:
    """The next micro batch: broadcast over tensor parallel ranks, labels shifted, documents found."""
    args = get_args()
    return read_batch(
        data_iterator,
        micro_batch_size=args.micro_batch_size if training else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        qkv_format="sbhd" if uses_packed_attention(args) else "thd",
        experts=bool(args.num_experts) and training and args.draft is None,
        features=stored_features(args),
    )


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None, model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """Run one micro batch through this pipeline stage.

    Returns:
        The stage's output (losses of trained tokens on the last stage) and the function that sums them.
    """
    watchdog.beat()
    args = get_args()
    batch = get_batch(data_iterator, training=model.training)
    chunk = unwrap_model(model)
    if not chunk.pre_process:
        join_stage_input(chunk)
    distiller: Distiller | None = getattr(chunk, "distiller", None)
    if distiller is not None:
        distiller.begin(batch)
    inputs = batch.tokens, batch.position_ids, None
    seen = {"pictures": batch.pictures} if batch.pictures else {}
    if args.draft is None:
        output_tensor = model(
            *inputs,
            **seen,
            labels=batch.labels,
            packed_seq_params=batch.packed,
            output_processor=trained_token_loss(
                args.vocab_size or args.padded_vocab_size,
                None if distiller is None else distiller.teach,
            ),
            output_processor_context=batch.trained,
        )
    else:
        output_tensor = model(
            *inputs, packed_seq_params=batch.packed, trained=batch.trained, **batch.features
        )
    if not chunk.post_process:
        if distiller is not None:
            output_tensor = distiller.beside(output_tensor)
        micro = args.micro_batch_size if model.training else args.eval_micro_batch_size
        output_tensor = split_stage_output(output_tensor, micro)
    reported = distiller.lm if distiller is not None else None
    return output_tensor, functools.partial(loss_func, batch.trained, reported=reported)


def non_loss_data_func(
    model: list[torch.nn.Module], run_log: RunLog, prompts: list[list[int]], answering: Any
) -> None:
    """After an evaluation: how many drafted tokens a speculative head gets accepted, and answers."""
    if (length := report_acceptance(model, prompts, new_tokens=32)) is not None:
        run_log.found["draft_acceptance_length"] = length
    if answering is not None:
        answering.ask(model[0], run_log)


def finetune(
    args: argparse.Namespace,
    console: TextIO,
    splits: dict[str, Split],
    start: resume.Start,
    position: DataPosition | None,
    teacher: Teacher | None,
    task: Any = None,
    rows: dict[str, TaskRows] | None = None,
    answering: Answering | None = None,
    calibration: SFTDataset | None = None,
) -> None:
    """Run `pretrain()` with everything wired together; needs validated arguments and prepared data."""
    continue_wandb(args)
    set_global_variables(args, build_tokenizer=False)
    writer_queue.apply(args)
    watchdog.start(args, console)
    resume.Fallback(args, start, position, console)
    run_log = RunLog(args, console, {name: split.sources.names for name, split in splits.items()})
    if args.draft is not None:
        counters.name_parts(part_names(args.draft_ttt_steps))
    settings = knowledge_settings(args)
    if settings is not None:
        counters.name_parts(knowledge_parts(settings))
    saver = None if position is None else CheckpointSaver(args, position.facts, console)
    best = None if args.early_stop_metric is None else EarlyStopping(args, run_log)
    if best is not None and saver is not None:
        saver.best = lambda: best.best_iteration
        saver.on_complete.append(best.write)
    graceful = GracefulExit(args, console)
    step: Any = forward_step
    if task is not None:
        step = TaskStep(task, args.task, run_log.progress.message)
        counters.gathers_names = True
    quantised = None
    if calibration is not None:
        known = start.checkpoint is not None and start.checkpoint.has_modelopt
        quantised = Calibration(
            args, calibration, forward_step, run_log.progress.message, quantised=known
        )
        hooks.on_train_start.append(quantised.begin)
    install_safeguards(args, forward_step, splits.get("train"), run_log)

    def provider(num_samples: Sequence[int], vp_stage: int | None = None) -> Any:
        # Called once the model and a checkpoint are loaded: the first step comes next.
        if not vp_stage:
            watchdog.meet()
            check_same_documents(splits, current_device())
            run_log.begin(args.iteration)
            if best is not None:
                best.continue_from(args.iteration)
            if saver is not None:
                saver.started(args.iteration)
        return train_valid_test_sft_datasets_provider(
            num_samples, vp_stage, args=args, splits=splits, rows=rows
        )

    # Every tensor parallel rank hears where training begins; only the first of each group reads data.
    provider.is_distributed = True  # type: ignore[attr-defined]
    model: Any
    if task is not None:
        model, prompts = task_model_config(args, start.checkpoint, task), []
    else:
        model = model_config(
            args,
            start.checkpoint,
            draft_tokens=draft_tokens(args, splits),
            knowledge=settings,
            teacher=teacher,
            say=run_log.progress.message,
        )
        prompts = first_prompts(splits, 4)
    with ending_together(run_log):
        pretrain(
            pretrain_cfg_container_from_args(args, model),
            provider,
            ModelType.encoder_or_decoder,
            step,
            non_loss_data_func=functools.partial(
                non_loss_data_func, run_log=run_log, prompts=prompts, answering=answering
            ),
        )
        if quantised is not None and run_log.last_iteration >= (args.train_iters or 0):
            quantised.end()
    found = None if best is None else best.best_iteration
    report_end(args, console, graceful, run_log.last_iteration, EXPORTER, found)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    console: TextIO = sys.stderr
    rank = int(os.environ.get("RANK", "0"))
    started = False
    args: argparse.Namespace | None = None
    try:
        command = COMMAND if argv is None else CommandLine(argv)
        args = parse_arguments(command)
        if args.only == "check":
            print(describe_layout(args), file=console)
            return 0
        run_lock.hold(args)
        start = resume.choose_checkpoint(args)
        if args.hf_model is not None:
            check_weights(args, start.checkpoint)
        if rank == 0 and (note := command.recipe.note(f"--config {command.file}")) is not None:
            print(note, file=console)
        if args.backend_reason and rank == 0:
            print(
                f"{args.hf_model}: its own class of transformers under --use-torch-fsdp2, not Megatron's "
                f"layers ({args.backend_reason})",
                file=console,
            )
        settings, teacher = knowledge_settings(args), choose_teacher(args)
        if settings is not None and teacher is not None:
            check_weights(teacher.args, teacher.checkpoint)
            check_pairs(settings, args, teacher.args)
        output.prepare_output(args)
        keep_date(args, start.template_date)
        task, rows = None, None
        if args.task is not None:
            tokenizer = load_tokenizer(args) if args.hf_tokenizer or args.hf_model else None
            task = load_task(args, tokenizer, command.recipe.sections)
            splits, rows = task_splits(args, task)
        else:
            tokenizer, splits = prepare_data(
                args, names=stored_names(args), wanted=functools.partial(wanted_features, args=args)
            )
        answering = None if args.answer_tokens is None else Answering(args, tokenizer)
        calibration = calibration_data(args, splits, tokenizer) if args.quantisation else None
        check_stored(args, splits)
        keep_date(args, template_date(splits))
        taught = teaching(args, splits, settings, teacher)
        position = find_position(args, splits.get("train"), start.continued, taught)
        raise_if_interrupted()
        if rank == 0:
            report = describe(splits, args) if task is None else describe_rows(splits, args)
            print(report, file=console)
            if not args.eval_only:
                file = Path(args.output_dir) / DATA_REPORT
                file.write_text(report + "\n", encoding="utf-8")
            if (adapter := describe_adapter(args)) is not None:
                print(adapter, file=console)
        if args.only == "prepare":
            newest = start.continued
            step = 0 if newest is None else newest.iteration
            note_outcome("prepared", progress=step, folder=args.output_dir)
            return 0
        console = output.redirect_logs(args)
        if not args.eval_only:
            output.save_config(args)
            if tokenizer is not None:
                output.save_model_folder(args, tokenizer)
        hooks.evaluation_iterations = evaluation_batches(args, splits)
        hooks.evaluates_at_start = args.eval_at_start
        place = {} if position is None else position.flags()
        evaluates = bool(hooks.evaluation_iterations)
        complete_run(args, **start.flags(), **place, evaluates=evaluates)
        validate(args)
        started = True
        finetune(
            args, console, splits, start, position, teacher, task, rows, answering, calibration
        )
    except (SetupError, DataError, RunStopped) as error:
        return tell(error, console, started=started, first=watchdog.fail())
    except KeyboardInterrupt:
        return 130
    except SystemExit as ended:
        if started and ended.code not in (None, 0):  # Megatron prints its reasons and leaves
            print(f"error on rank {rank}: Megatron ended the run; its log says why", file=console)
        raise
    except Exception as error:
        full = no_room(error)
        if full is not None and not watchdog.explains(error):
            return tell_no_room(full, args.output_dir if args else None, rank, console)
        if isinstance(error, OSError) and error.filename and not started:
            return tell(error, console, started=False)  # a path that the system refuses
        tell_failure(error, rank, console)
        raise
    finally:
        watchdog.stop()
    return 0


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, interrupt)
    sys.exit(main())
