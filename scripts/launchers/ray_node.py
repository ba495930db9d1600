"""What an actor of `launch_ray.py` does on its node: children, their signals and their outcome."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray

from scripts.launchers.attempt import launcher_variables, read_outcome


class RayNode:
    """The launcher of one node. Megatron's globals, handlers and exits do not fit a worker's thread."""

    def __init__(self, environment: Mapping[str, str], folder: str) -> None:
        """Take the driver's variables and folder, which the node must see too."""
        self.environment, self.folder = {**os.environ, **environment}, folder
        self.child: subprocess.Popen[bytes] | None = None
        self.stopping = False

    def address(self) -> tuple[str, int]:
        """This node's address, and a port that is free there."""
        with socket.create_server(("", 0)) as held:
            return ray.util.get_node_ip_address(), held.getsockname()[1]

    def run(
        self, words: Sequence[str], processes: int | None = None, here: int = 1
    ) -> tuple[int, dict[str, Any]]:
        """Run a command to its end; returns its status and what it has told.

        Args:
            words: the command.
            processes: it is to act as rank 0 of so many, without devices.
            here: so many of them on a node.
        """
        with tempfile.TemporaryDirectory() as folder:
            outcome = Path(folder) / "outcome.json"
            environment = {**self.environment, "SFT_OUTCOME": str(outcome)}
            if processes is not None:
                environment.update(launcher_variables(processes, here))
            self.child = subprocess.Popen(words, env=environment, cwd=self.folder)
            if self.stopping:
                self.child.terminate()
            return self.child.wait(), read_outcome(outcome)

    def stop(self, grace: float) -> None:
        """Ask the child to save and end, and wait; after `grace` seconds end it and its own children."""
        self.stopping = True
        if self.child is None or self.child.poll() is not None:
            return
        processes = [psutil.Process(self.child.pid)]
        processes += processes[0].children(recursive=True)
        self.child.send_signal(signal.SIGTERM)
        try:
            self.child.wait(grace)
        except subprocess.TimeoutExpired:
            for process in processes:
                process.kill()
