"""Starts processes: `finetune.py` as a user does, and ranks of a process group for single functions.

A launch with torchrun costs as much as importing torch, Megatron and transformers in every process.
Most tests therefore let their ranks be forked from one server process that has imported
`finetune` already (multiprocessing's own "forkserver"); each rank is still a process of its own that
runs `finetune.main()` from the command line's words, with the variables that torchrun sets.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
# In the environment of a run that must end before its process group starts.
NO_PROCESS_GROUP = "TEST_NO_PROCESS_GROUP"
# Seconds after which something counts as hung, however busy the machine is.
LIMIT = 1200.0
_server: Any = None


def forkserver() -> Any:
    """The one server a test process can have; what it forks has imported `finetune` already."""
    global _server
    if _server is None:
        os.environ.update(ENVIRONMENT)
        _server = multiprocessing.get_context("forkserver")
        _server.set_forkserver_preload(["tests.helpers.preload"])
    return _server


def rendezvous() -> TCPStore:
    """Where the ranks of a job meet: as under a launcher, on a port that is taken as long as this lives."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _become_rank(rank: int, world: int, port: int, environment: Mapping[str, str]) -> None:
    os.chdir(ROOT)
    os.environ.update(
        ENVIRONMENT
        | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        | dict(environment)
    )


def _redirect(stdout: str, stderr: str) -> None:
    for name, number in ((stdout, 1), (stderr, 2)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)


@dataclass
class Finished:
    """What a run of `finetune.py` left behind."""

    status: int
    """Exit status of rank 0 (negative: the signal that ended it)."""
    statuses: list[int]
    """Exit status of every rank."""
    console: str
    """What rank 0 printed on stderr."""
    folder: Path
    """Its `--output-dir`."""

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records of `metrics.jsonl`."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").open()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Records of training steps."""
        return [record for record in self.records if "lm_loss" in record]

    @property
    def losses(self) -> list[float]:
        """Loss of each logged step."""
        return [step["lm_loss"] for step in self.steps]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Records of evaluations."""
        return [record for record in self.records if "split" in record]

    def ok(self) -> Finished:
        """Itself.

        Raises:
            AssertionError: a rank failed; with its console and the end of the log.
        """
        if any(self.statuses):
            log = self.folder / "train.log"
            tail = log.read_text()[-3000:] if log.is_file() else ""
            raise AssertionError(f"exit {self.statuses}\n{self.console}\n{tail}")
        return self


def _finetune_rank(
    argv: list[str],
    rank: int,
    world: int,
    port: int,
    console: str,
    environment: dict[str, str],
    inject: Callable[[], None] | None,
) -> None:
    _become_rank(rank, world, port, environment)
    _redirect(os.devnull, console)
    import torch

    import finetune

    if NO_PROCESS_GROUP in environment:
        setattr(torch.distributed, "init_process_group", _refuse_process_group)  # noqa: B010
    if inject is not None:
        inject()
    sys.exit(finetune.main(argv))


def _refuse_process_group(*args: Any, **kwargs: Any) -> None:
    print("a process group is started", file=sys.stderr, flush=True)
    os._exit(99)


@dataclass
class Running:
    """A run of `finetune.py` that has been started."""

    processes: list[Any]
    folder: Path
    consoles: list[Path]
    store: TCPStore

    def wait(self) -> Finished:
        """Wait for the end of all ranks; when one fails the others are ended, as torchrun does."""
        deadline = time.monotonic() + LIMIT
        failed_at: float | None = None
        while any(process.exitcode is None for process in self.processes):
            now = time.monotonic()
            if failed_at is None and any(p.exitcode not in (None, 0) for p in self.processes):
                failed_at = now
            if now > deadline or (failed_at is not None and now > failed_at + 120.0):
                for process in self.processes:
                    if process.exitcode is None:
                        process.kill()
            time.sleep(0.01)
        statuses = [process.exitcode for process in self.processes]
        console = self.consoles[0].read_text()
        if any(statuses) and not statuses[0]:
            console += "".join(path.read_text() for path in self.consoles[1:])
        return Finished(statuses[0], statuses, console, self.folder)

    def wait_for_step(self, step: int) -> None:
        """Wait until `metrics.jsonl` shows that `step` is done."""
        deadline = time.monotonic() + LIMIT
        file = self.folder / "metrics.jsonl"
        while time.monotonic() < deadline:
            if file.is_file():
                steps = [
                    json.loads(line)["iteration"] for line in file.open() if line.endswith("\n")
                ]
                if step in steps:
                    return
            if any(process.exitcode is not None for process in self.processes):
                raise AssertionError(f"ended early\n{self.consoles[0].read_text()}")
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank."""
        for process in self.processes:
            os.kill(process.pid, number)


def start_finetune(
    folder: Path,
    *flags: str,
    world: int = 1,
    environment: Mapping[str, str] | None = None,
    inject: Callable[[], None] | None = None,
) -> Running:
    """Start `finetune.py FLAGS --output-dir FOLDER` on `world` ranks.

    Args:
        folder: the output folder.
        flags: the rest of the command line.
        world: number of processes.
        environment: further variables.
        inject: a module-level function that each rank calls first, such as a fault to be found.
    """
    context = forkserver()
    folder.parent.mkdir(parents=True, exist_ok=True)
    store = rendezvous()
    argv = [*flags, "--output-dir", str(folder)]
    consoles = [folder.parent / f"{folder.name}.console{rank}" for rank in range(world)]
    for console in consoles:
        console.write_text("")
    processes = []
    for rank in range(world):
        process = context.Process(
            target=_finetune_rank,
            args=(
                argv,
                rank,
                world,
                store.port,
                str(consoles[rank]),
                dict(environment or {}),
                inject,
            ),
        )
        process.start()
        processes.append(process)
    return Running(processes, folder, consoles, store)


def finetune(
    folder: Path,
    *flags: str,
    world: int = 1,
    environment: Mapping[str, str] | None = None,
    inject: Callable[[], None] | None = None,
) -> Finished:
    """Run `finetune.py FLAGS --output-dir FOLDER` to its end on `world` ranks."""
    return start_finetune(
        folder, *flags, world=world, environment=environment, inject=inject
    ).wait()


def command(*words: str, world: int | None = None) -> list[str]:
    """The command line of a script of this project, through torchrun where `world` is given."""
    if world is None:
        return [sys.executable, *words]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return [sys.executable, *launcher, *rendezvous, *words]


def run_script(
    *words: str,
    world: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script in a new interpreter, as a user does."""
    return subprocess.run(
        command(*words, world=world),
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def finetune_on_double(double: str, folder: Path, *flags: str, world: int = 1) -> Finished:
    """Run `finetune.py FLAGS` where a module of `tests.helpers` stands for what this machine lacks."""
    words = ("-m", f"tests.helpers.{double}", "finetune.py", *flags, "--output-dir", str(folder))
    done = run_script(*words, world=world if world > 1 else None)
    return Finished(done.returncode, [done.returncode], done.stderr, folder)


def _call_rank(
    function: Callable[..., Any],
    pickled_args: bytes,
    rank: int,
    world: int,
    port: int,
    answer: Connection,
) -> None:
    _become_rank(rank, world, port, {})
    _redirect(os.devnull, os.devnull)
    try:
        import finetune  # noqa: F401 - imported already, unless the server could not

        result = (True, function(*pickle.loads(pickled_args)))
    except BaseException:  # noqa: BLE001 - told to the test, whatever it is
        result = (False, traceback.format_exc())
    # Pickled here: torch would have multiprocessing share the memory of tensors, which ends with us.
    answer.send_bytes(pickle.dumps(result))
    answer.close()
    # Not by the interpreter's way out: it would wait for the peers' threads.
    os._exit(0)


def run_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Call a module-level function on `world` ranks that have imported `finetune`.

    Args:
        function: called as `function(*args)`; it finds its rank in the environment, as everywhere.
        world: number of processes.
        args: picklable arguments.

    Returns:
        The (picklable) results in the order of the ranks.

    Raises:
        AssertionError: a rank raised; with its traceback.
    """
    context = forkserver()
    store = rendezvous()
    pairs = [context.Pipe(duplex=False) for _ in range(world)]
    processes = []
    for rank, (_, answer) in enumerate(pairs):
        process = context.Process(
            target=_call_rank,
            args=(function, pickle.dumps(args), rank, world, store.port, answer),
        )
        process.start()
        answer.close()
        processes.append(process)
    results: list[Any] = []
    failures: list[str] = []
    deadline = time.monotonic() + LIMIT
    for rank, (receiver, _) in enumerate(pairs):
        if failures:
            deadline = min(deadline, time.monotonic() + 2.0)
        try:
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                failures.append(f"rank {rank} did not answer")
                continue
            good, value = pickle.loads(receiver.recv_bytes())
        except EOFError:
            failures.append(f"rank {rank} died")
            continue
        if good:
            results.append(value)
        else:
            failures.append(f"rank {rank}: {value}")
    for process in processes:
        process.join(0.5)
        if process.exitcode is None:
            process.kill()
    if failures:
        raise AssertionError("\n".join(failures))
    return results


def run_rank(function: Callable[..., Any], *args: Any) -> Any:
    """Call a module-level function in one new process that has imported `finetune`."""
    return run_ranks(function, 1, *args)[0]
