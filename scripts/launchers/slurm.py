"""Runs a script of this project on the nodes of a SLURM job, and requeues the job until it is complete.

    python -m scripts.launchers.slurm submit --nodes 4 --gpus-per-node 8 [OPTION...] SCRIPT.sbatch FLAG...
    python -m scripts.launchers.slurm run finetune.py FLAG...         in the batch script, on the first node

`submit` checks the flags for as many processes and prepares the data in a job of its own without GPUs; the
batch job waits for that. What the batch script does is in docs/clusters.md. Only the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from scripts.launchers.attempt import (
    STATUS,
    Ending,
    attempt,
    launcher_variables,
    read_outcome,
)

ROOT = Path(os.path.abspath(__file__)).parents[2]
# Ports of rendezvous, from here on: below those that a kernel gives out.
PORTS, PORT_COUNT = 20000, 10000
# Seconds between two questions to a controller that does not answer.
WAIT = 12.0
# Minutes that a health check may take before it counts as hung.
HEALTH_MINUTES = 15
# Kinds of GPUs that scripts/plan.py knows by name.
KINDS = ("a100", "a800", "h100", "h200", "b200", "gb200")


def kind_of(name: str) -> str:
    """A GPU's kind as the planner knows it, by a type of Slurm's; "" where it does not."""
    return name.lower() if name.lower() in KINDS else ""


def planner(python: str, kind: str, processes: int, here: int, flags: list[str]) -> list[str]:
    """The command that refuses a layout that does not fit `processes` GPUs, `here` of them on a node."""
    gpus = f"--gpus {processes}x{kind} --gpus-per-node {here}".split()
    return [python, str(ROOT / "scripts/plan.py"), "--check", *gpus, *flags]


def show(kind: str, name: str, tries: int = 6) -> dict[str, str]:
    """The fields of `scontrol show`; {} where there is no such thing, or nobody answers for a minute."""
    words = ["scontrol", "show", kind, name, "-o"]
    variables = {**os.environ, "SLURM_TIME_FORMAT": "standard"}  # a user's own cannot be read back
    for number in range(tries):
        shown = subprocess.run(words, capture_output=True, text=True, check=False, env=variables)
        if shown.returncode == 0:
            return dict(re.findall(r"(\w+)=(\S*)", shown.stdout))
        time.sleep(WAIT if number < tries - 1 else 0.0)  # the controller may be starting anew
    return {}


def lead_seconds(metrics: Path) -> float:
    """How long before its end a job must stop: for a step, a save and what is between; 0: not known."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 18)))
            tail = file.read().decode(errors="replace")
    except OSError:
        return 0.0

    def longest(name: str) -> float:
        # The last line may be written just now: 1.5e- of 1.5e-05 is no number, 1.5 is.
        number = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
        return max(map(float, re.findall(rf'"{name}": {number}', tail)), default=0.0)

    save = longest("save_seconds")
    return 60.0 + 3.0 * longest("step_seconds") + 2.0 * save if save else 0.0


class Job:
    """The batch job that this process is the script of."""

    def __init__(self, script: str) -> None:
        """Read the job's variables.

        Args:
            script: by its path from the repository's root.
        """
        self.script, self.id = str(ROOT / script), os.environ["SLURM_JOB_ID"]
        shown = show("job", self.id)
        counts = (os.environ.get("SLURM_RESTART_COUNT"), shown.get("Restarts"))
        self.restart = max(int(count or 0) for count in counts)
        self.folder = Path.cwd() / f"slurm-{self.id}"
        self.folder.mkdir(exist_ok=True)
        listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        self.nodes = subprocess.run(
            listed, capture_output=True, text=True, check=True
        ).stdout.split()
        # A node's name need not be one that the others can look up.
        self.addresses = [show("node", node).get("NodeAddr") or node for node in self.nodes]
        gpus = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
        self.here = _count("SFT_PROCESSES_PER_NODE") or gpus or 1
        self.device = "cuda" if gpus else ""
        listed_type = re.match(r"gpu:(\w+):", show("node", self.nodes[0]).get("Gres", ""))
        self.kind = os.environ.get("SFT_GPU_TYPE", kind_of(listed_type[1] if listed_type else ""))
        self.python = "python" if os.environ.get("SFT_CONTAINER") else sys.executable
        end = shown.get("EndTime", "")
        self.end = datetime.fromisoformat(end).timestamp() if end[:1].isdigit() else float("inf")
        self.output: Path | None = None
        self.leaving: str | None = None
        """Why the run is asked to save and end."""
        self.ended = False
        """Slurm ends the job: it is cancelled, at its limit, preempted or requeued."""

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Handles signals: USR1 is for the batch script alone, TERM and CONT for all that Slurm ends."""
        if number == signal.SIGUSR1:
            self.leaving = self.leaving or "time limit near, or asked to by SIGUSR1"
        elif number == signal.SIGTERM:
            self.ended = True

    def step(self, what: str, flags: list[str]) -> tuple[int, dict[str, Any]]:
        """Run one step of the job to its end, and return its status and what it has told."""
        if what == "health" and os.environ.get("SFT_HEALTH_CHECK") == "0":
            return 0, {}
        outcome = self.folder / f"{what}-{self.restart}.json"
        logs = str(self.folder).replace("%", "%%")  # srun replaces the likes of %j
        outcome.unlink(missing_ok=True)
        environment = {**os.environ, "SFT_OUTCOME": str(outcome), "SFT_DEVICE": self.device}
        options = ["--kill-on-bad-exit=1", "--wait=3600", "--cpu-bind=none", "--open-mode=append"]
        if os.environ.get("SFT_CONTAINER"):
            options += [f"--container-image={os.environ['SFT_CONTAINER']}"]
            options += [f"--container-mounts={os.environ.get('SFT_MOUNTS') or f'{ROOT}:{ROOT}'}"]
            options += [f"--container-workdir={Path.cwd()}"]
        if what == "prepare":
            for name in [name for name in environment if name.startswith("SLURM_GPUS")]:
                del environment[name]  # srun would ask for them
            environment.update(launcher_variables(self.here * len(self.nodes), self.here))
            options += [
                f"--output={logs}/prepare.log",
                *"--nodes=1 --ntasks=1 --gres=none".split(),
            ]
            words = [self.python, self.script, *flags]
            if self.kind and not self.restart and self.script == str(ROOT / "finetune.py"):
                plan = planner(
                    self.python, self.kind, self.here * len(self.nodes), self.here, flags
                )
                words = ["bash", "-c", f"{shlex.join(plan)} && exec {shlex.join(words)}"]
        else:
            count = len(self.nodes)
            options += [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"]
            options += [f"--output={logs}/node-%N.log"]
            words = ["bash", "-c", self.on_each_node(what, flags)]
            if what == "health":
                options.append(f"--time={HEALTH_MINUTES}")
                for file in self.folder.glob("look.*"):
                    file.unlink()
        status = self.wait(subprocess.Popen(["srun", *options, *words], env=environment))
        told = read_outcome(outcome)
        if what == "prepare" and "folder" in told:
            self.output = Path(told["folder"])
        if what == "health" and status:
            told["reason"] = self.odd_nodes()
        return status, told

    def on_each_node(self, what: str, flags: list[str]) -> str:
        """The shell line of every node: it becomes the launcher."""
        port = PORTS + (int(self.id) * 7 + self.restart) % PORT_COUNT
        while not _is_free(port):
            port += 1
        name = f"{self.id}.{self.restart}.{what}"
        launcher = shlex.join([self.python, str(ROOT / "scripts/launch.py")])
        launcher += f" --nnodes {len(self.nodes)} --nproc-per-node {self.here} --rdzv-backend c10d"
        launcher += f" --rdzv-id {name} --rdzv-endpoint {self.addresses[0]}:{port}"
        line = f"addresses=({shlex.join(self.addresses)}); exec {launcher}"
        line += " --rdzv-conf is_host=$((SLURM_NODEID == 0))"
        line += " --local-addr ${addresses[SLURM_NODEID]}"
        if what != "health":
            return f"{line} {shlex.join([self.script, *flags])}"
        health = [str(ROOT / "scripts/launchers/health.py")]
        look = [self.python, *health, "look", str(self.folder), str(self.here)]
        return f"{shlex.join(look)} || exit 1; {line} {shlex.join([*health, 'meet'])}"

    def odd_nodes(self) -> str:
        """What is known of a health check that failed, by node."""
        found = []
        for node in self.nodes:
            try:
                wrong = json.loads((self.folder / f"look.{node}").read_text())
            except (OSError, ValueError):
                wrong = "did not look at its devices"
            found += [f"{node} {wrong}"] if wrong else []
        return "; ".join(found) or "the nodes did not meet; see their logs"

    def wait(self, srun: subprocess.Popen[bytes]) -> int:
        """Wait for a step; where the job must leave its nodes, let the step save first, and end."""
        sent = 0.0
        while True:
            try:
                return srun.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                pass
            lead = lead_seconds(self.output / "metrics.jsonl") if self.output else 0.0
            if lead and time.time() > self.end - lead:
                self.leaving = self.leaving or f"time limit in less than {lead:.0f} s"
            # Again and again, as a step may only just have begun: to a run it is one signal. srun itself
            # must not hear it: it would kill its step.
            if self.leaving and not self.ended and time.monotonic() > sent + 30.0:
                sent = time.monotonic()
                subprocess.run(["scancel", "--signal=TERM", self.id], check=False)

    def last_error(self) -> str:
        """What the newest log of a step that has refused something says."""
        logs = sorted(self.folder.glob("*.log"), key=lambda log: log.stat().st_mtime)
        lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line.startswith("error: ")), "")

    def finish(self, ending: Ending) -> int:
        """Say why this start ended, in the last line of the batch log, and requeue the job or end it."""
        text = f"restart {self.restart}: {ending.reason}"
        if self.leaving and ending.verdict == "again":
            text += f"; {self.leaving}"
        if ending.verdict == "refused" and (line := self.last_error()):
            text += f": {line}"
        state = show("job", self.id, 1 if self.ended else 6)
        if ending.verdict != "again":
            again = "the job ends" if ending.verdict == "complete" else "the job is not requeued"
        elif self.ended or state.get("JobState", "RUNNING") != "RUNNING":
            again = f"Slurm ends this start (job state {state.get('JobState')})"
        elif state.get("Requeue") == "0":
            again = "not requeued: submitted with --no-requeue"
        else:
            print(f"{text}; requeued", flush=True)
            if subprocess.run(["scontrol", "requeue", self.id], check=False).returncode:
                print(f"{text}; scontrol requeue failed: submit the same again", flush=True)
            return STATUS["again"]
        print(f"{text}; {again}", flush=True)
        return STATUS[ending.verdict]

    def run(self, flags: list[str]) -> int:
        """One start of the job; returns its exit status."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGCONT):
            signal.signal(number, self.hear)
        record = self.folder / "progress.json"
        # At first there is none of this job: numbers of jobs are given out again.
        seen = _steps_in(record) if self.restart else []

        def step(what: str, words: list[str]) -> tuple[int, dict[str, Any]]:
            return (143, {}) if self.leaving or self.ended else self.step(what, words)

        def keep() -> None:
            whole = record.with_suffix(".partial")
            whole.write_text(json.dumps(seen))
            whole.replace(record)

        return self.finish(attempt(step, flags, seen, keep))


def _steps_in(record: Path) -> list[int]:
    """What the starts before have found; [] where a full disk has left nothing that can be read."""
    try:
        return [int(step) for step in json.loads(record.read_text())]
    except (OSError, ValueError, TypeError):
        return []


def _count(name: str) -> int:
    """A variable that counts something; 0 where it is not set.

    Raises:
        ValueError: it is no count.
    """
    text = os.environ.get(name) or ""
    if text and not re.fullmatch(r"[1-9]\d*", text, re.ASCII):
        raise ValueError(f"{name}={text}: expects a whole number of at least 1, or no value")
    return int(text or 0)


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True


def _gpus(text: str) -> tuple[str, int]:
    """What sbatch takes as `--gpus-per-node`: a type, which may be left out, and a number."""
    kind, _, number = text.rpartition(":")
    return kind, int(number)


def submit(argv: list[str]) -> int:
    """Check the flags here, then submit a job that prepares the data and one that runs after it."""
    parser = argparse.ArgumentParser(prog="slurm.py submit", allow_abbrev=False)
    setattr(parser, "error", lambda message: parser.exit(2, f"error: {message}\n"))  # noqa: B010
    parser.add_argument("--nodes", "-N", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=_gpus, default=("", 0), metavar="[TYPE:]NUMBER")
    parser.add_argument(
        "--gpu-type",
        default=os.environ.get("SFT_GPU_TYPE"),
        help="h100, 80gib ...: refuse a layout that does not fit (that of --gpus-per-node)",
    )
    parser.add_argument("--processes-per-node", type=int, help="default: one for a GPU, or one")
    parser.add_argument("--data-option", action="append", default=[], help="for the data's sbatch")
    parser.add_argument("--dependency", "-d", help="as sbatch's; the data is waited for too")
    scripts = [at for at, word in enumerate(argv) if word.endswith(".sbatch")]
    if not scripts:
        parser.error("no .sbatch script is named")
    batch, flags = argv[scripts[0]], argv[scripts[0] + 1 :]
    options, more = parser.parse_known_args(argv[: scripts[0]])
    kind, gpus = options.gpus_per_node
    if min(options.nodes, gpus + 1, options.processes_per_node or 1) < 1:
        parser.error("--nodes and --processes-per-node are at least 1, --gpus-per-node at least 0")
    other = [word for word in more if re.match(r"-G|--(gpus|gres|tres-per)\b", word)]
    if other and not gpus:
        parser.error(f"{other[0]}: say GPUs by --gpus-per-node, which is a process each")
    here = options.processes_per_node or gpus or 1
    name = f"{Path(batch).stem}.py"
    script = ROOT / name if name == "finetune.py" else ROOT / "scripts" / name
    if gpus:
        os.environ["SFT_DEVICE"] = "cuda"
        more += [f"--gpus-per-node={f'{kind}:' if kind else ''}{gpus}"]
    os.environ["SFT_PROCESSES_PER_NODE"] = str(here)
    ranks = {**os.environ, **launcher_variables(options.nodes * here, here)}
    command = [sys.executable, str(script), *flags, "--only"]
    if status := subprocess.run([*command, "check"], env=ranks, check=False).returncode:
        return status
    if options.gpu_type is None:
        options.gpu_type = kind_of(kind)
    if options.gpu_type and name == "finetune.py":
        plan = planner(sys.executable, options.gpu_type, options.nodes * here, here, flags)
        if status := subprocess.run(plan, check=False).returncode:
            return status
        os.environ["SFT_GPU_TYPE"] = ""  # not again there
    data = (
        "sbatch --parsable --nodes=1 --ntasks=1 --job-name=sft-data".split() + options.data_option
    )
    data.append(f"--wrap=exec {shlex.join([*command, 'prepare'])}")
    before = subprocess.run(data, env=ranks, stdout=subprocess.PIPE, text=True, check=False)
    if before.returncode:
        return before.returncode
    number = before.stdout.strip().partition(";")[0]
    after = ",".join(filter(None, [f"afterok:{number}", options.dependency]))
    words = ["sbatch", f"--nodes={options.nodes}", f"--dependency={after}"]
    words += ["--kill-on-invalid-dep=yes", *more, batch, *flags]
    if status := subprocess.run(words, check=False).returncode:
        subprocess.run(["scancel", number], check=False)
    return status


def main() -> int:
    """Command line; returns the exit status."""
    what, *words = sys.argv[1:] or [""]
    try:
        if what == "run" and words:
            return Job(words[0]).run(words[1:])
        if what == "submit":
            return submit(words)
    except (OSError, ValueError) as error:  # a full disk, no sbatch, a variable that is no number
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
