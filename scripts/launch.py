"""torchrun for finetuning: waits for the checkpoint after Ctrl-C and ends with the workers' status.

python scripts/launch.py --nproc-per-node 2 finetune.py --hf-model ...

Takes torchrun's arguments; without --nproc-per-node it starts a process for each GPU, or one. --dry-run
checks the flags, and prints the layout and torchrun's command. torchrun itself kills its workers 30 seconds
after a signal, in the middle of a longer save, and ends with a traceback of its own and status 1 whatever
they did. This passes the signal on and waits. Its status: 0 when all workers ended so, also after a signal;
2 when they refused what was asked, 130 and 143 when SIGINT or SIGTERM ended them; 1 for everything else,
with a line for each worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

# Until there are workers, Ctrl-C ends the process by the signal, without a traceback.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import psutil
from torch.cuda import device_count
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from post_training.machine.outcome import note_outcome

# Scripts that take `--only check`.
_CHECKED = ("finetune.py", "extract_features.py")
# What the workers say by their status, and have told themselves.
_TOLD = {2, 128 + signal.SIGINT, 128 + signal.SIGTERM}


def _pass_on(number: int, frame: FrameType | None) -> None:
    workers = psutil.Process().children()
    if not workers:  # other machines are waited for
        sys.exit(128 + number)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.send_signal(number)


def status_of(failures: Iterable[ProcessFailure]) -> int:
    """The status of a launcher whose workers failed.

    Args:
        failures: of this machine's workers, and of those that torchrun ended after the first of them, with
            SIGTERM or, where that did not help, SIGKILL.

    Returns:
        The workers' own where it tells what happened, else 1.
    """
    statuses = {f.exitcode if f.exitcode >= 0 else 128 - f.exitcode for f in failures}
    own = statuses - {128 + signal.SIGTERM, 128 + signal.SIGKILL} or statuses
    return own.pop() if len(own) == 1 and own <= _TOLD else 1


def main() -> int:
    """Start the workers as torchrun does, forward SIGINT and SIGTERM to them; returns the exit status."""
    parser = run.get_args_parser()
    parser.allow_abbrev = False
    parser.add_argument("--dry-run", action="store_true")
    setattr(parser, "error", lambda message: parser.exit(2, f"error: {message}\n"))  # noqa: B010
    if "PET_NPROC_PER_NODE" not in os.environ:
        parser.set_defaults(nproc_per_node=str(device_count() or 1))
    arguments = parser.parse_args(sys.argv[1:])
    script = arguments.training_script
    if not (arguments.module or arguments.no_python or Path(script).is_file()):
        print(f"error: {script}: no such file", file=sys.stderr)
        return 2
    # The two signals are ours; torchrun's own handler would raise.
    arguments.signals_to_handle = "SIGQUIT"
    if (
        refused := _refused(arguments.nproc_per_node, arguments.nnodes, arguments.node_rank)
    ) is not None:
        print(f"error: {refused}", file=sys.stderr)
        return 2
    if arguments.dry_run:
        return _show(arguments)
    alone = arguments.nnodes == "1:1" and arguments.rdzv_backend in ("static", "c10d")
    if arguments.rdzv_endpoint == "" and alone:
        arguments.rdzv_backend, arguments.rdzv_endpoint = "c10d", "127.0.0.1:0"
    if not arguments.max_restarts:  # else its lines are all that tells of the first failures
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel("CRITICAL")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _pass_on)
    try:
        run.run(arguments)
    except (ValueError, AssertionError, OSError) as error:  # of its own arguments
        reason = str(error) or "one of torchrun's arguments cannot be used"
        print(f"error: {reason}", file=sys.stderr)
        return 2
    except ChildFailedError as error:
        status = status_of(error.failures.values())
        if status not in _TOLD:
            _tell(error.failures)
        return status
    return 0


def _refused(processes: str, nodes: str, node_rank: int) -> str | None:
    """What torchrun would wait for, or stumble over without a word; None for what it takes."""
    with contextlib.suppress(ValueError):  # auto, cpu, gpu
        if int(processes) < 1:
            return f"--nproc-per-node {processes}: must be at least 1"
        if 0 < device_count() < int(processes):
            return (
                f"--nproc-per-node {processes}: each needs a GPU, this machine has {device_count()}"
            )
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", nodes, re.ASCII):
        return f"--nnodes {nodes}: expects how many machines, or LEAST:MOST"
    least, _, most = nodes.rpartition(":")
    if int(least or 1) > int(most):
        return f"--nnodes {nodes}: at least {least} machines are more than at most {most}"
    if node_rank >= int(most):
        return f"--node-rank {node_rank}: the ranks of {most} nodes begin at 0"
    return None


def _show(arguments: Any) -> int:
    """Let the script check its flags for as many processes, and print torchrun's command for them."""
    script, words = arguments.training_script, arguments.training_script_args
    try:
        here = run.determine_local_world_size(arguments.nproc_per_node)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if Path(script).name in _CHECKED:
        everywhere = here * int(arguments.nnodes.rpartition(":")[2])
        ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": everywhere, "LOCAL_WORLD_SIZE": here}
        environment = os.environ | {name: str(value) for name, value in ranks.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        check = [sys.executable, script, *words, "--only", "check"]
        if status := subprocess.run(check, env=environment, check=False).returncode:
            return status
    given = [word for word in sys.argv[1 : sys.argv.index(script)] if word != "--dry-run"]
    if not any(word.startswith(("--nproc-per-node", "--nproc_per_node")) for word in given):
        given += ["--nproc-per-node", str(here)]
    print(shlex.join(["torchrun", *given, script, *words]))
    return 0


def _tell(failures: dict[int, ProcessFailure]) -> None:
    """Say of each worker that failed by itself how it ended."""
    for rank, failure in sorted(failures.items()):
        how = f"ended with status {failure.exitcode}"
        if failure.exitcode < 0:
            how = f"was ended by {failure.signal_name()}"
        if failure.exitcode != -signal.SIGTERM:
            where = f"process {failure.pid} on {socket.gethostname()}"
            print(f"rank {rank} ({where}) {how}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    status = main()
    if status == 2:
        note_outcome("refused")
    sys.exit(status)
