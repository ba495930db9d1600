"""torchrun for finetuning: waits for the checkpoint after Ctrl-C and ends with the workers' status.

python scripts/launch.py --nproc-per-node 2 finetune.py --hf-model ...

Takes torchrun's arguments. torchrun itself kills its workers 30 seconds after a signal, in the middle of
a longer save, and ends with status 1 whatever they did; this passes the signal on and waits.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import psutil
from torch.distributed import run


def _pass_on(number: int, frame: FrameType | None) -> None:
    for child in psutil.Process(os.getpid()).children():
        child.send_signal(number)


def main() -> None:
    """Start the workers as torchrun does and forward SIGINT and SIGTERM to them."""
    arguments = run.parse_args(sys.argv[1:])
    # The two signals are ours; torchrun's own handler would raise.
    arguments.signals_to_handle = "SIGQUIT"
    if arguments.rdzv_endpoint == "" and arguments.nnodes == "1:1":
        arguments.rdzv_backend, arguments.rdzv_endpoint = "c10d", "127.0.0.1:0"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _pass_on)
    run.run(arguments)


if __name__ == "__main__":
    main()
