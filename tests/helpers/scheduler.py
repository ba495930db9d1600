"""A SLURM cluster of this machine: daemons on loopback, in a folder of their own; nothing is left."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.helpers.launch import ENVIRONMENT, LIMIT, ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue")
NODES = ("n1", "n2", "n3")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=600
KillWait=3600
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
JobRequeue=1
{nodes}
PartitionName=all Nodes=n[1-3] Default=YES MaxTime=INFINITE State=UP
"""


def installed() -> bool:
    """Whether Debian's slurm-wlm and munge are there, or what stands for them."""
    return all(shutil.which(program, path=_path()) for program in PROGRAMS)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin"


def wait_for(what: str, found: Callable[[], object]) -> None:
    """Wait until something is true, however busy the machine is."""
    deadline = time.monotonic() + LIMIT
    while not found():
        assert time.monotonic() < deadline, f"{what}: not in {LIMIT:.0f} s"
        time.sleep(0.1)


class Scheduler:
    """Three nodes of four processors each, all of them this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = (
            os.environ
            | ENVIRONMENT
            | {
                "SLURM_CONF": str(folder / "slurm.conf"),
                "PATH": _path(),
                "PYTHONPATH": str(ROOT),
            }
        )
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all daemons, and wait until the nodes can be used."""
        self.folder.chmod(0o755)  # munged asks for it
        held = [socket.create_server(("127.0.0.1", 0)) for _ in range(1 + len(NODES))]
        ports = [each.getsockname()[1] for each in held]
        host, folder = socket.gethostname().partition(".")[0], self.folder
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host, controller=ports[0], user=getpass.getuser(), folder=folder, nodes=nodes
            )
        )
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
        self._run("munged", "munged", "--foreground", f"--socket={folder}/munge.socket", *files)
        self._wait("munged", (folder / "munge.socket").exists)
        for each in held:
            each.close()
        self._run("slurmctld", "slurmctld", "-D", "-c")
        for name in NODES:
            self.start_node(name)
        self._wait("idle nodes", lambda: self.nodes().count("idle") == len(NODES))

    def _wait(self, what: str, found: Callable[[], bool]) -> None:
        def there() -> bool:
            for name, daemon in self.daemons.items():
                assert daemon.poll() is None, (self.folder / f"{name}.out").read_text()
            return found()

        wait_for(what, there)

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self._run(name, "slurmd", "-D", "-N", name)

    def _run(self, name: str, *words: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self.daemons[name] = subprocess.Popen(
            words, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )

    def call(self, *words: str, **variables: str) -> str:
        """Run one of SLURM's commands and return what it prints; "" where it fails."""
        done = subprocess.run(
            words, env=self.environment | variables, capture_output=True, text=True, cwd=self.folder
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    def nodes(self) -> list[str]:
        """The state of each node."""
        return self.call("sinfo", "-h", "-N", "-o", "%T").split()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        shown = self.call("scontrol", "show", "job", job, "-o").split()
        return next((word.partition("=")[2] for word in shown if word.startswith(f"{name}=")), "")

    def wait_for_state(self, job: str, *states: str) -> None:
        """Wait until a job is in one of the states."""
        wait_for(f"job {job} {states}", lambda: self.field(job, "JobState") in states)

    def stop(self) -> None:
        """End all jobs, daemons and whatever they have left."""
        self.call("scancel", "--signal=KILL", "--user", getpass.getuser())
        self.call("scancel", "--user", getpass.getuser())
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if not ours and process.name() == "slurmstepd":  # of no such environment
                    sockets = process.net_connections(kind="unix")
                    ours = any(str(self.folder) in str(each.laddr) for each in sockets)
                if ours:
                    process.send_signal(signal.SIGKILL)
            except psutil.Error:
                continue
        for daemon in self.daemons.values():
            daemon.wait(60)


@contextmanager
def scheduler() -> Iterator[Scheduler]:
    """A running cluster."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # short: it holds a socket
        made = Scheduler(Path(folder))
        try:
            made.start()
            yield made
        finally:
            made.stop()
