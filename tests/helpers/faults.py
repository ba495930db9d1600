"""Faults that a rank of `finetune` has, for tests that they are found: see its `inject`."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# In the environment: the token that a fault befalls, and where to note optimizer steps.
TOKEN = "TEST_FAULT_TOKEN"
STEPS = "TEST_OPTIMIZER_STEPS"
# Seconds without progress from step 3 on.
HANG_TIMEOUT = "TEST_HANG_TIMEOUT"
# A folder on a disk of its own.
DISK = "TEST_DISK"
# Where a run stays until it is killed: `step N`, or `save K FILE`.
HOLD = "TEST_HOLD"
# And the file to which plans are counted.
PLANS = "TEST_PLANS"


def _finetune() -> Any:
    import finetune

    return finetune


def leaky_attention() -> None:
    """Attention that sees one long document where there are several."""
    from post_training.model.attention import PackedAttention

    right = PackedAttention.forward

    def leak(self: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Tensor:
        return right(self, *args, packed_seq_params=None, **kwargs)

    PackedAttention.forward = leak  # type: ignore[method-assign]


def _leak(weight: float) -> None:
    """Every value grows by `weight` of the mean of all values of the row."""
    from post_training.model.attention import PackedAttention

    right = PackedAttention.forward

    def leak(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Tensor:
        return right(self, query, key, value + weight * value.mean(0, keepdim=True), *args, **kw)

    PackedAttention.forward = leak  # type: ignore[method-assign]


def unlike_documents() -> None:
    """A first document that sees the row's last token: a leak backwards in time only."""
    _leak(1e-3)


def weak_leak() -> None:
    """Attention that leaks a millionth."""
    _leak(1e-6)


def weak_leak_in_bf16() -> None:
    """Attention that leaks as little as bf16 does not round away."""
    _leak(1e-2)


def blind_model() -> None:
    """A model whose losses do not depend on anything but the label."""
    finetune = _finetune()
    right = finetune.trained_token_loss

    def blind(vocabulary: int, *more: Any) -> Any:
        process = right(vocabulary, *more)
        return lambda *, hidden_states, **kw: process(hidden_states=hidden_states * 0, **kw)

    finetune.trained_token_loss = blind


class _Poison(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(context: Any, losses: Tensor) -> Tensor:
        return losses.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("nan")


def _befall(what: Any) -> None:
    """Change the losses of the label that the environment names while training."""
    finetune = _finetune()
    right = finetune.trained_token_loss
    token = int(os.environ[TOKEN])

    def faulty(vocabulary: int, *more: Any) -> Any:
        process = right(vocabulary, *more)

        def befallen(*, labels: Tensor, context: Any, **kwargs: Any) -> Tensor:
            losses = process(labels=labels, context=context, **kwargs)
            hit = labels.flatten().index_select(0, context.indices) == token
            if not torch.is_grad_enabled() or not bool(hit.any()):
                return losses
            changed: Tensor = what(losses, hit)
            return changed

        return befallen

    finetune.trained_token_loss = faulty
    _note_steps()


def _note_steps() -> None:
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from megatron.training import get_args

    right = ChainedOptimizer.step_with_ready_grads

    def noted(self: Any) -> Any:
        with open(os.environ[STEPS], "a") as file:
            file.write(f"{get_args().curr_iteration + 1}\n")
        return right(self)

    ChainedOptimizer.step_with_ready_grads = noted


def nan_loss() -> None:
    """The named label's loss is not a number."""
    _befall(lambda losses, hit: torch.where(hit, losses * float("nan"), losses))


def nan_loss_while_saving() -> None:
    """The same, before the background has written the checkpoint of the step before."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    right = FileSystemWriterAsync.write_preloaded_data

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(2.0)
        return right(*args, **kwargs)

    setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(slow))  # noqa: B010
    nan_loss()


def killed_writer() -> None:
    """The background process that writes rank 1's part of a checkpoint is killed."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    right, here = FileSystemWriterAsync.write_preloaded_data_multithread, os.getpid()

    def dies(*args: Any, **kwargs: Any) -> Any:
        if os.getpid() != here and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return right(*args, **kwargs)

    name = "write_preloaded_data_multithread"
    setattr(FileSystemWriterAsync, name, staticmethod(dies))


def infinite_loss() -> None:
    """The named label's loss is infinite, and its gradient finite."""
    _befall(lambda losses, hit: losses + torch.where(hit, float("inf"), 0.0))


def nan_gradient() -> None:
    """The named label's loss is right, and its gradient not a number."""
    _befall(lambda losses, hit: torch.where(hit, _Poison.apply(losses), losses))


def load_that_exits() -> None:
    """Megatron leaves with status 0 where it cannot read a checkpoint or build what it needs."""
    from megatron.training import training

    def leave(*args: Any, **kwargs: Any) -> None:
        sys.exit()

    setattr(training, "setup_model_and_optimizer", leave)  # noqa: B010


def no_optimizer() -> None:
    """An optimizer that cannot be built, for a run that needs none."""
    from megatron.training import training

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an optimizer is built")

    training.get_megatron_optimizer = refuse


def shards_only() -> None:
    """A run whose processes must hold a part of each weight, and build no optimizer."""
    from torch.distributed.tensor import DTensor

    from post_training.hf_models.build import HFModelBuilder

    no_optimizer()
    build = HFModelBuilder.build_distributed_models

    def look(*args: Any, **kwargs: Any) -> Any:
        chunks = build(*args, **kwargs)
        whole = [n for n, p in chunks[0].named_parameters() if not isinstance(p, DTensor)]
        assert not whole, f"held whole: {whole[:3]}"
        return chunks

    HFModelBuilder.build_distributed_models = look  # type: ignore[method-assign]


def _at_step(step: int, rank: int, what: Any) -> None:
    """Do something on one rank in the forward pass of a step."""
    finetune = _finetune()
    right = finetune.forward_step

    def faulty(iterator: Any, model: Any) -> Any:
        from megatron.training import get_args

        # `get_args` has the steps done; the check before the first step has nothing to do with it.
        if model.training and get_args().curr_iteration + 1 == step and get_args().rank == rank:
            what()
        return right(iterator, model)

    finetune.forward_step = faulty


def hang_at_step_3() -> None:
    """Rank 1 sleeps for ever."""
    _at_step(3, 1, sleep_for_ever)
    _watch_closely()


def _watch_closely() -> None:
    """From step 3 on with another limit: what is slow before it on a busy machine is no hang."""
    finetune = _finetune()

    def closely() -> None:
        finetune.watchdog.limit = float(os.environ[HANG_TIMEOUT])

    for rank in range(int(os.environ["WORLD_SIZE"])):
        _at_step(3, rank, closely)


def sleep_for_ever() -> None:
    """Where the hung rank is found."""
    while True:
        time.sleep(1)


def hang_after_an_evaluation() -> None:
    """At step 3 all ranks are alive until `--eval-only` is done in their folder; then rank 1 hangs."""
    from megatron.training import get_args

    finetune = _finetune()

    def wait_then_hang() -> None:
        done = Path(get_args().output_dir) / "evaluations.jsonl"
        while not done.exists():  # the test ends a run whose evaluation fails
            finetune.watchdog.beat()
            time.sleep(0.05)
        finetune.watchdog.limit = float(os.environ[HANG_TIMEOUT])
        if get_args().rank == 1:
            sleep_for_ever()

    for rank in range(2):
        _at_step(3, rank, wait_then_hang)


def stop_at_step_3() -> None:
    """Rank 1's process is stopped: not even its threads run."""
    _at_step(3, 1, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    _watch_closely()


def kill_at_step_3() -> None:
    """Rank 1 is killed, as the kernel does when memory runs out."""
    _at_step(3, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail_at_step_3() -> None:
    """Rank 1 raises an error."""

    def fail() -> None:
        raise ZeroDivisionError("of its own making")

    _at_step(3, 1, fail)


def dies_while_others_hang() -> None:
    """Rank 1 is killed, and the others wait without an end, as with NCCL."""
    hang = threading.Event().wait

    def faulty() -> None:
        if int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        hang()

    for rank in range(int(os.environ["WORLD_SIZE"])):
        _at_step(3, rank, faulty)


def fails_while_others_hang() -> None:
    """Rank 1 raises an error; the others wait, and the process group is destroyed by all, as with NCCL."""
    fail_at_step_3()
    setattr(torch.distributed, "destroy_process_group", threading.Event().wait)  # noqa: B010
    for rank in range(int(os.environ["WORLD_SIZE"])):
        if rank != 1:
            _at_step(3, rank, threading.Event().wait)


def hang_in_set_up() -> None:
    """Rank 1 never comes to the point where the ranks meet."""
    from post_training.arguments.completion import PATIENCE

    finetune = _finetune()
    model_config = finetune.model_config

    def closely(*args: Any, **options: Any) -> Any:
        finetune.watchdog.beat()
        finetune.watchdog.limit = float(os.environ[HANG_TIMEOUT]) / PATIENCE
        return sleep_for_ever() if int(os.environ["RANK"]) == 1 else model_config(*args, **options)

    finetune.model_config = closely


def hang_in_data() -> None:
    """Rank 1 hangs before it watches itself."""
    finetune = _finetune()
    if int(os.environ["RANK"]) == 1:
        finetune.prepare_data = lambda args, **options: sleep_for_ever()


def slow_save() -> None:
    """Saving takes longer than a step may."""
    from megatron.training import training

    right = training.save_checkpoint

    def slow(*args: Any, **kwargs: Any) -> Any:
        watchdog = _finetune().watchdog
        limit, watchdog.limit = watchdog.limit, float(os.environ[HANG_TIMEOUT])
        time.sleep(1.5 * watchdog.limit)
        watchdog.limit = limit
        return right(*args, **kwargs)

    training.save_checkpoint = slow


def stay_at_step_7() -> None:
    """Rank 0 comes no further, until it is killed."""
    _at_step(7, 0, sleep_for_ever)


def hold_for_a_kill() -> None:
    """The run stays where the environment says: before a step, or in the K-th save, which makes a file."""
    from post_training.checkpoint.saver import CheckpointSaver

    what, number, *file = os.environ[HOLD].split(" ", 2)
    left = int(number)
    if what == "step":
        for rank in range(int(os.environ["WORLD_SIZE"])):
            _at_step(left, rank, sleep_for_ever)
        return
    begin, finish = CheckpointSaver.begin, CheckpointSaver.finish

    def begins(self: Any, iteration: int) -> Path | None:
        nonlocal left
        mark = begin(self, iteration)
        left -= mark is not None
        if left == 0:
            Path(*file).touch()
        return mark

    def finishes(self: Any, iteration: int, error: BaseException | None) -> None:
        if left <= 0:
            sleep_for_ever()
        finish(self, iteration, error)

    setattr(CheckpointSaver, "begin", begins)  # noqa: B010
    setattr(CheckpointSaver, "finish", finishes)  # noqa: B010


def hold_where_told() -> None:
    """Every rank stays at the step that a file names, alive, until the file names another."""
    from megatron.training import get_args

    finetune = _finetune()
    right, file = finetune.forward_step, Path(os.environ[HOLD])

    def held(iterator: Any, model: Any) -> Any:
        while model.training and file.read_text() == str(get_args().curr_iteration + 1):
            finetune.watchdog.beat()
            time.sleep(0.05)
        return right(iterator, model)

    finetune.forward_step = held


def kill_at_step_1() -> None:
    """The last rank is killed."""
    last = int(os.environ["WORLD_SIZE"]) - 1
    _at_step(1, last, lambda: os.kill(os.getpid(), signal.SIGKILL))


def limit_files_at_step_4() -> None:
    """No file may grow beyond 200 kB any more, as with a quota: the disk itself has room."""
    for rank in range(int(os.environ["WORLD_SIZE"])):
        _at_step(4, rank, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))


def fill(disk: Path) -> None:
    """Leave no byte of it."""
    file = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(file, b"x" * 4096)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    finally:
        os.close(file)


def fill_disk_in_a_save() -> None:
    """Something else takes the space between the look at the disk and the first byte of a checkpoint."""
    from post_training.checkpoint.saver import CheckpointSaver

    right = CheckpointSaver.begin

    def begin(self: Any, iteration: int) -> Path | None:
        mark = right(self, iteration)
        if os.environ["RANK"] == "0":
            fill(Path(os.environ[DISK]))
        return mark

    setattr(CheckpointSaver, "begin", begin)  # noqa: B010


def count_plans() -> None:
    """No fault: each plan of an epoch, and each filling of packs, is a line of the file `$PLANS`."""
    from data.packs import epoch_plans

    def counted(name: str, function: Any) -> Any:
        def call(lengths: Any, *args: Any, **options: Any) -> Any:
            with open(os.environ[PLANS], "a") as file:
                file.write(f"{os.environ['RANK']} {name} {len(lengths)} {options.get('epoch')}\n")
            return function(lengths, *args, **options)

        return call

    for name in ("plan_epoch", "fill_packs"):
        setattr(epoch_plans, name, counted(name, getattr(epoch_plans, name)))


def leaky_documents() -> None:
    """A model of transformers that sees one long document where there are several."""
    from post_training.hf_models import model
    from post_training.hf_models.packing import Documents

    right = Documents.begin
    setattr(model, "choose_way", lambda *args, **options: "attention")  # noqa: B010

    def leak(self: Any, way: str, lengths: list[int] | None) -> None:
        right(self, way, lengths and [sum(lengths)])

    Documents.begin = leak  # type: ignore[method-assign]
