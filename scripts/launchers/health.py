"""Whether all machines of a job are well, in some seconds, before it starts; names the odd one.

    srun --ntasks-per-node 1 python scripts/launchers/health.py look FOLDER 8   on each node: devices
    launch.py ... scripts/launchers/health.py meet                              on each process: all-reduce

Each node leaves FOLDER/look.NODE, so that one that hangs or never starts is the one without a file.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

# Numbers of an all-reduce (fp32, 64 MiB on a GPU), how often, and how long one may take.
NUMBERS = {"cuda": 1 << 24, "cpu": 1 << 16}
ROUNDS = 5
LIMIT = datetime.timedelta(seconds=600)
# A node whose own all-reduce takes so many times as long as the median's is told of.
SLOW = 3.0


def node_name() -> str:
    """As the scheduler knows this machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def look(processes: int) -> str | None:
    """See that each process has a device, and that it computes; returns what is wrong."""
    devices = torch.cuda.device_count()
    if devices and devices < processes:
        return f"sees {devices} GPUs, {processes} processes need one each"
    if not devices and os.environ.get("SFT_DEVICE") == "cuda":
        return "sees no GPU"
    for number in range(min(devices, processes)):
        try:
            ones = torch.ones(1024, 1024, device=f"cuda:{number}")
            if float((ones @ ones).mean()) != 1024.0:
                return f"GPU {number} computes wrong sums"
        except RuntimeError as error:
            return f"GPU {number}: {str(error).splitlines()[0]}"
    return None


def meet() -> str | None:
    """All-reduce among all processes, and within each node; returns what is wrong, on rank 0 and where."""
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    here, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=LIMIT)
    own: Any = torch.distributed.new_subgroups(here)[0]
    numbers, seconds = torch.empty(NUMBERS[kind], device=device), []
    for group in (own, None):  # a wrong sum within a node is that node's
        for _ in range(ROUNDS):
            numbers.fill_(1.0)
            torch.distributed.barrier()
            begin = time.monotonic()
            torch.distributed.all_reduce(numbers, group=group)
            total = float(numbers.max())  # waits for the device
            seconds.append(time.monotonic() - begin)
        if total != (world if group is None else here):
            return f"rank {rank} got a wrong sum"
    everyone: list[tuple[str, float]] = [("", 0.0)] * world
    torch.distributed.all_gather_object(everyone, (node_name(), min(seconds[:ROUNDS])))
    torch.distributed.destroy_process_group()
    if rank == 0:
        times = everyone[::here]
        usual = statistics.median(each for _, each in times)
        text = f"{world} processes on {len(times)} nodes: an all-reduce takes"
        print(f"{text} {min(seconds[ROUNDS:]) * 1e3:.1f} ms", file=sys.stderr)
        for name, each in times:
            if each > SLOW * usual and each > 0.05:
                text = f"warning: {name} takes {each * 1e3:.1f} ms alone, others {usual * 1e3:.1f}"
                print(text, file=sys.stderr, flush=True)
    return None


def main() -> int:
    """Command line; returns the exit status."""
    if sys.argv[1] == "meet":
        wrong = meet()
    else:
        wrong = look(int(sys.argv[3]))
        Path(sys.argv[2], f"look.{node_name()}").write_text(json.dumps(wrong))
    if wrong:
        print(f"error: {node_name()}: {wrong}", file=sys.stderr, flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
