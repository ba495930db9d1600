"""A start of finetune.py as a process of its own, for check.py."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
# The launcher's variables and this process's choice of device are not for the runs.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_")
# Some images let fp32 products be rounded to 10 bits: then fp32 is not what is compared.
TF32 = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE")


class CheckError(Exception):
    """A run that did not end as it should; the message holds the end of its output."""


@dataclass
class Run:
    """One start of finetune.py and what it leaves behind."""

    folder: Path
    flags: list[str]
    device: str
    gpus: int = 1

    def start(self) -> subprocess.Popen[bytes]:
        """Start it; its output goes to files of the folder."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith((*LAUNCHER, *TF32))}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        launcher = [sys.executable]
        if self.gpus > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(self.gpus)]
            launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        output = ["--output-dir", str(self.folder), "--no-progress"]
        self.folder.mkdir(parents=True)
        with (self.folder / "console.txt").open("wb") as console:
            return subprocess.Popen(
                [*launcher, str(ROOT / "finetune.py"), *self.flags, *output],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )

    def steps(self) -> list[dict[str, Any]]:
        """Records of the steps that are complete in metrics.jsonl."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.is_file() else []
        return [record for record in map(json.loads, lines) if "lm_loss" in record]

    def output(self, characters: int | None = None) -> str:
        """The end of what it printed; all of it without a number."""
        texts = [
            file.read_text(errors="replace")
            for file in (self.folder / "train.log", self.folder / "console.txt")
            if file.is_file()
        ]
        return "\n".join(text[-characters:] if characters else text for text in texts)

    def peak_memory(self) -> float:
        """Most memory that torch allocated on one device, in GiB, from Megatron's log lines."""
        peaks = [
            float(line.split("max allocated: ")[1].split(" ")[0])
            for line in self.output().splitlines()
            if "max allocated: " in line
        ]
        return max(peaks, default=math.nan) / 1024

    def losses(self, timeout: float) -> list[float]:
        """Run to the end.

        Raises:
            CheckError: it failed, or took too long.
        """
        process = self.start()
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise CheckError(f"not done after {timeout:.0f} s\n{self.output(1500)}") from None
        finally:
            end(process)
        if status:
            raise CheckError(f"exit status {status}\n{self.output(1500)}")
        return [step["lm_loss"] for step in self.steps()]

    def first_steps(self, number: int, timeout: float) -> list[dict[str, Any]]:
        """Run `number` steps, then end it at once: the checkpoint would say nothing.

        Raises:
            CheckError: it failed, or took too long.
        """
        process = self.start()
        deadline = time.monotonic() + timeout
        try:
            while len(self.steps()) < number:
                if process.poll() is not None:
                    raise CheckError(f"exit status {process.returncode}\n{self.output(1500)}")
                if time.monotonic() > deadline:
                    raise CheckError(f"not done after {timeout:.0f} s\n{self.output(1500)}")
                time.sleep(0.2)
        finally:
            end(process)
        return self.steps()[:number]


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a run with all processes that it started; torchrun's workers leave its process group."""
    if process.poll() is None:
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()
