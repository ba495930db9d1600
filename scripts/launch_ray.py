"""Runs finetune.py on the nodes of a Ray cluster, and starts it again until it is complete.

    python scripts/launch_ray.py --nodes 2 --processes-per-node 8 -- --hf-model ... --output-dir runs/first

One actor a node starts scripts/launch.py as a child of its own. A lost actor or node starts the group again
from the newest checkpoint, with progress only; flags and data that are refused end it. Ctrl-C saves.
Status: 0 complete, or saved after Ctrl-C (130: not begun); 2 refused; 3 no progress; 1 too many restarts.
See docs/clusters.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # every rank's line counts

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from post_training.recipes.roll import devices_of
from scripts.launchers.attempt import STATUS, Ending, attempt, judge
from scripts.launchers.ray_node import RayNode

ROOT = Path(__file__).resolve().parents[1]
# Variables of the driver's that the ranks see.
PASSED = re.compile(
    r"SFT_|NCCL_|GLOO_|TORCH|PYTORCH_|CUDA_DEVICE_MAX|OMP_|HF_|WANDB_|TOKENIZERS_|PYTHONPATH$"
)
# Seconds that ranks are given to save and end, once they are told to.
GRACE = 600.0


class Group:
    """One actor on each node; made anew for each start."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Place the actors, where Ray has GPUs and `--cpu` is not given one a process on them.

        Raises:
            TimeoutError: there are not so many nodes with so many free devices in `--wait` seconds.
        """
        self.options = options
        gpus = bool(ray.cluster_resources().get("GPU")) and not options.cpu
        bundle: dict[str, float] = {"CPU": float(options.processes_per_node)}
        if gpus:
            bundle["GPU"] = float(options.processes_per_node)
        if options.accelerator:
            bundle[f"accelerator_type:{options.accelerator}"] = 0.001
        self.placement = placement_group([bundle] * options.nodes, strategy="STRICT_SPREAD")
        if not self.placement.wait(options.wait):
            remove_placement_group(self.placement)
            raise TimeoutError(f"Ray has not {options.nodes} nodes with {bundle} free")
        self.running: list[Any] = []
        """What a step waits for, one a node."""
        passed = {name: value for name, value in os.environ.items() if PASSED.match(name)}
        passed["SFT_DEVICE"] = "cuda" if gpus else ""
        resources = {name: n for name, n in bundle.items() if name.startswith("accelerator")}
        self.nodes = [
            ray.remote(RayNode)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                resources=resources,
                max_concurrency=3,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, number),
            )
            .remote(passed, os.getcwd())
            for number in range(options.nodes)
        ]

    def step(self, what: str, flags: list[str]) -> tuple[int, dict[str, Any]]:
        """Run one step on the nodes that it needs, and return its status and what it has told."""
        here, count = self.options.processes_per_node, self.options.nodes
        script = str(ROOT / self.options.script)
        if what == "health":
            script, flags = str(ROOT / "scripts/launchers/health.py"), ["meet"]
        if what == "prepare":
            words = [sys.executable, script, *flags]
            return self.wait([self.nodes[0].run.remote(words, here * count, here)])
        address, port = ray.get(self.nodes[0].address.remote())
        launcher = (
            f"--nnodes {count} --nproc-per-node {here} --rdzv-backend c10d --rdzv-id {port}".split()
        )
        launcher += ["--rdzv-endpoint", f"{address}:{port}"]
        launcher = [sys.executable, str(ROOT / "scripts/launch.py"), *launcher]
        waiting = []
        for number, node in enumerate(self.nodes):
            own, _ = ray.get(node.address.remote())
            where = ["--rdzv-conf", f"is_host={int(number == 0)}", "--local-addr", own]
            waiting.append(node.run.remote([*launcher, *where, script, *flags]))
        return self.wait(waiting)

    def wait(self, running: list[Any]) -> tuple[int, dict[str, Any]]:
        """Wait for a step's children; the first that fails, or whose actor is lost, ends the others."""
        status, left = 0, list(running)
        told: dict[str, Any] = {}
        self.running = running
        while left:
            done, left = ray.wait(left)
            try:
                ended, said = ray.get(done[0])
            except ray.exceptions.RayError as error:
                print(f"a node is lost: {type(error).__name__}", file=sys.stderr, flush=True)
                ended, said = 1, {}
            told = said or told
            if ended and not status:
                status = ended
                self.stop(GRACE)
        return status, told

    def stop(self, grace: float) -> None:
        """Let all children save and end, and wait for them; those of lost actors hear it of the others."""
        for each in [node.stop.remote(grace) for node in self.nodes]:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(each)

    def remove(self) -> None:
        """Give the nodes back."""
        for node in self.nodes:
            ray.kill(node)
        remove_placement_group(self.placement)


def leave(number: int, frame: FrameType | None) -> None:
    """Handles SIGTERM as Ctrl-C, once: a scheduler sends it several times, which must not end the save."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def start_once(options: argparse.Namespace, seen: list[int]) -> Ending:
    """One start of the run."""
    group: Group | None = None
    try:
        group = Group(options)
        return attempt(group.step, options.flags, seen, lambda: None)
    except TimeoutError as error:
        return Ending("refused", str(error))
    except ray.exceptions.RayError as error:  # before the run began
        return Ending("again", f"a node is lost: {type(error).__name__}")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if group is None:
            return Ending("interrupted", "ended before it began")
        print("saving; Ctrl-C again leaves without it", file=sys.stderr, flush=True)
        group.stop(GRACE)
        status, told = group.wait(group.running)
        ending = judge(status, told)
        return Ending("saved" if told.get("outcome") == "stopped" else "interrupted", ending.reason)
    finally:
        if group is not None:
            group.remove()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The driver's own flags; `flags` are the script's."""
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--nodes", type=int, help="machines, each with an actor")
    parser.add_argument("--processes-per-node", type=int, required=True, help="and devices")
    parser.add_argument(
        "--device-mapping", help="in the place of --nodes: ROLL's list of all devices"
    )
    parser.add_argument("--address", default="auto", help="of a running Ray (auto), or local")
    parser.add_argument("--accelerator", help="kind of device as Ray names it, such as H100")
    parser.add_argument(
        "--cpu", action="store_true", help="place by processors even if there are GPUs"
    )
    parser.add_argument("--max-restarts", type=int, default=10, help="(10)")
    parser.add_argument(
        "--wait", type=float, default=600.0, help="seconds for nodes to be free (600)"
    )
    parser.add_argument("--script", default="finetune.py", help="or scripts/extract_features.py")
    options = parser.parse_args(words[:at])
    nodes, here, flags = options.nodes or 0, options.processes_per_node, words[at + 1 :]
    if options.device_mapping is not None:
        devices = devices_of(options.device_mapping)
        if not devices:
            parser.error(
                f"--device-mapping {options.device_mapping}: expects list(range(A,B)) or [0, 1], "
                f"with each device once"
            )
        if nodes or here < 1 or devices % here:
            parser.error(
                f"--device-mapping names {devices} devices: leave --nodes out, and give a "
                f"--processes-per-node that divides them"
            )
        nodes = devices // here
    if not (ROOT / options.script).is_file():
        parser.error(f"--script {options.script}: no such file in {ROOT}")
    if nodes < 1 or here < 1 or not flags:
        parser.error(
            "expects --nodes, --processes-per-node and, behind --, the flags of finetune.py"
        )
    return argparse.Namespace(**{**vars(options), "nodes": nodes, "flags": flags})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    options = parse(argv)
    signal.signal(signal.SIGTERM, leave)
    try:
        ray.init(address=options.address, log_to_driver=True)
    except (ConnectionError, ValueError) as error:
        print(f"error: --address {options.address}: no Ray there ({error})", file=sys.stderr)
        return 2
    seen: list[int] = []
    restart = 0
    while True:
        ending = start_once(options, seen)
        text = f"restart {restart}: {ending.reason}"
        again = ending.verdict == "again" and restart < options.max_restarts
        print(text if not again else f"{text}; starting again", file=sys.stderr, flush=True)
        if not again:
            break
        restart += 1
        time.sleep(1.0)
    ray.shutdown()
    return (STATUS | {"saved": 0, "interrupted": 130})[ending.verdict]


if __name__ == "__main__":
    sys.exit(main())
