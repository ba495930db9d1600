"""A rank that hangs or dies ends the whole job, with one message that says which rank and where.

Each rank has a thread that looks at how long ago its main thread made progress (`beat`). Ranks tell each
other what they know through small files in a hidden folder of the output folder, which all nodes share:

    N        what rank N is doing; when an alarm is raised, also where its main thread stands
    alarm    some rank made no progress for too long: everyone tells where it stands
    ended    why the job ends; whoever makes this file prints the message, so that one does

A rank whose process is gone is noticed at once by the others on its machine. That matters most on CUDA,
where the others wait in a collective without an end; gloo raises an error that names no rank.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import re
import shutil
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from post_training import arrivals
from post_training.hang_report import ranks_text, who_hangs
from post_training.processes import is_running, this_host
from post_training.stack_places import place_of

# Set-up, the first step, an evaluation's first batch and saving may take this many times as long as an
# ordinary step.
PATIENCE = 6
# Seconds that the main thread is given to end by itself, once it is known that the job ends.
LAST_SECONDS = 5.0
# Seconds that the interpreter is given to end after an error, once that is told.
EXIT_SECONDS = 15.0
FOLDER = ".watchdog-"
# Of `--eval-only`, which may look at a run while that trains.
EVALUATION_FOLDER = ".watchdog-eval-"

_COMMUNICATION = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out|socket|TCPStore",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Peer:
    """A rank's process."""

    rank: int
    host: str
    """Machine and process namespace: process numbers mean the same within it."""
    pid: int


class Watchdog:
    """Watches this rank and its peers; the one instance is `watchdog`."""

    def __init__(self) -> None:
        self.rank = 0
        self.limit = 0.0
        self.folder: Path | None = None
        self._console: TextIO = sys.stderr
        self._hint = ""
        self._phase = "not started"
        self._patient = True
        self._patient_beats: int | None = None
        self._beats = self._phases = self._stage = 0
        self._last = time.monotonic()
        self._file = -1
        self._world = 1
        self._peers: list[Peer] = []
        self._output = Path()
        self._prefix = FOLDER
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._main = threading.main_thread().ident

    # --- called by the main thread ---------------------------------------------------------------

    def start(self, args: argparse.Namespace, console: TextIO) -> None:
        """Watch from now on, unless `--hang-timeout 0`.

        Args:
            args: validated arguments; `distributed_timeout_minutes` is raised, so that the watchdog,
                which can tell what happened, comes before torch's own timeout of a collective.
            console: where messages go.
        """
        timeout = args.hang_timeout
        self.limit = args.distributed_timeout_minutes * 60.0 if timeout is None else timeout
        if self.limit <= 0:
            return
        longest = (PATIENCE * self.limit + 120.0) / 60.0
        args.distributed_timeout_minutes = max(args.distributed_timeout_minutes, longest)
        self.rank, self._world, self._console = args.rank, args.world_size, console
        self._output = Path(args.output_dir)
        self._prefix = EVALUATION_FOLDER if args.eval_only else FOLDER
        self._hint = (
            f"to continue from the newest checkpoint in {args.save}, give the same command again"
        )
        self.beat("in set-up", patient=True)
        arrivals.arrive(self._output, self.rank)
        faulthandler.enable(all_threads=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def meet(self) -> None:
        """Get to know the other ranks, once there is a process group; every rank calls it."""
        if self._thread is None:
            return
        from megatron.core import parallel_state

        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(
            everyone, (Peer(self.rank, this_host(), os.getpid()), uuid.uuid4().hex[:12])
        )
        arrivals.leave(self._output, self.rank)
        folder = self._output / f"{self._prefix}{everyone[0][1]}"
        if self.rank == 0:
            for old in self._output.glob(f"{FOLDER}*"):
                if _is_left_over(old):
                    shutil.rmtree(old, ignore_errors=True)
            folder.mkdir()
        torch.distributed.barrier()
        self._file = os.open(folder / str(self.rank), os.O_RDWR | os.O_CREAT, 0o644)
        self._note()
        torch.distributed.barrier()  # from here on a missing file means an ended rank
        self._stage = parallel_state.get_pipeline_model_parallel_rank()
        self._peers = [peer for peer, _ in everyone]
        self.folder = folder

    def beat(
        self, phase: str | None = None, *, patient: bool = False, patient_beats: int | None = None
    ) -> None:
        """Say that there is progress.

        Args:
            phase: what comes next, such as `at step 5`; None where it is more of the same.
            patient: it may take long.
            patient_beats: how many beats within the phase it takes until nothing may take long any
                more; None for not before the next phase.
        """
        self._last = time.monotonic()
        self._beats += 1
        if phase is None:
            if self._patient_beats is not None:
                self._patient_beats -= 1
                self._patient = self._patient and self._patient_beats > 0
            return
        self._phases += 1
        self._phase, self._patient, self._patient_beats = phase, patient, patient_beats
        self._note()

    def stop(self) -> None:
        """Watch no longer: this rank ends by itself.

        Where it leaves a process group behind, it is made to end soon: what a library does on the way
        out may wait for the others.
        """
        if self._thread is None:
            return
        self._stop.set()
        if torch.distributed.is_initialized():
            faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True)
        else:
            faulthandler.cancel_dump_traceback_later()
        self._phase = "ended"
        self._note()
        if self._file >= 0:
            os.close(self._file)  # over NFS others may see it only now
            self._file = -1
        self._thread = None

    def clean(self) -> None:
        """Remove what the ranks wrote, after a run that ended well; rank 0 does.

        It waits for the others: to one that still watches, a missing file is a rank that died.
        """
        if self.folder is None or self.rank != 0:
            return
        deadline = time.monotonic() + LAST_SECONDS
        while any(self._read(peer.rank).get("phase") != "ended" for peer in self._peers):
            if time.monotonic() > deadline:
                return  # the next run removes it
            time.sleep(0.01)
        shutil.rmtree(self.folder, ignore_errors=True)

    def explains(self, error: BaseException) -> bool:
        """Whether another rank is why this one failed; then the reason has been told once.

        Otherwise the others are told that it is this rank that failed.
        """
        if self.folder is None:
            return False
        if _COMMUNICATION.search(f"{type(error).__name__} {error}"):
            deadline = time.monotonic() + LAST_SECONDS
            while time.monotonic() < deadline:
                dead = self.dead_peers()
                if dead:
                    self._tell(self._died(dead))
                if (self.folder / "ended").exists():
                    return True
                time.sleep(0.1)
        self.fail()
        return False

    def fail(self) -> None:
        """Let the others know that the job ends because of this rank, which says why by itself."""
        if self.folder is not None:
            self._claim(f"rank {self.rank} failed")

    def job_ends(self) -> bool:
        """Whether it is known already why the job ends: a rank of this machine is gone, or has failed."""
        if self.folder is None:
            return False
        return (self.folder / "ended").exists() or bool(self.dead_peers())

    def dead_peers(self) -> list[Peer]:
        """Ranks of this machine whose processes are gone without having said so."""
        here = this_host()
        return [
            peer
            for peer in self._peers
            if peer.host == here
            and peer.rank != self.rank
            and not is_running(peer.pid)
            and self._read(peer.rank).get("phase") != "ended"
        ]

    # --- called by the thread --------------------------------------------------------------------

    def _watch(self) -> None:
        poll = min(1.0, self.limit / 20)
        look_at_files = min(10.0, self.limit / 30)
        looked = 0.0
        while not self._stop.wait(poll):
            # Should a call hold the interpreter so that this thread never runs again, a C thread tells.
            faulthandler.dump_traceback_later(PATIENCE * self.limit, exit=True)
            now = time.monotonic()
            if self._stale(now):
                self._alarm()
            if self.folder is None:
                continue
            try:
                dead = self.dead_peers()
                if dead and not (self.folder / "ended").exists():
                    self._tell(self._died(dead))
                if dead or now - looked >= look_at_files:
                    looked = now
                    if (self.folder / "ended").exists():
                        self._leave(LAST_SECONDS)
                    if (self.folder / "alarm").exists():
                        self._alarm()
            except OSError:
                continue  # what the disk does is no reason to stop watching

    def _stale(self, now: float) -> bool:
        return now - self._last > self.limit * (PATIENCE if self._patient else 1)

    def _alarm(self) -> None:
        """Tell where this rank stands; the first to do so then tells about all. Does not return."""
        try:
            self._tell_where()
        finally:
            os._exit(1)  # whatever the disk, the log or the folder does

    def _tell_where(self) -> None:
        idle = time.monotonic() - self._last
        place = place_of(sys._current_frames().get(self._main or 0))
        what = f"rank {self.rank} {self._phase}: no progress for {idle:.0f} s"
        with contextlib.suppress(OSError):  # a full disk
            print(what, file=sys.stderr)
            faulthandler.dump_traceback(all_threads=True)
        try:
            if self.folder is None:
                raise FileNotFoundError
            (self.folder / "alarm").touch()
        except OSError:  # nothing to be heard of the others, nor to be told to them
            absent = arrivals.missing(self._output, self._world) if place.waits else []
            text = f"{what}, at {place.text}"
            if absent:
                have, still = ("has", "hangs") if len(absent) == 1 else ("have", "hang")
                text = (
                    f"{ranks_text(absent)} {have} not come to the process group: {still} in the imports or "
                    f"the data, or is not there. {text}"
                )
            print(f"error: {text}", file=self._console, flush=True)
            return
        self._note(
            place=place.text,
            waits=place.waits,
            phases=self._phases,
            beats=self._beats,
            stage=self._stage,
        )
        # The others look every now and then.
        time.sleep(1.0 + 2 * min(10.0, self.limit / 30))
        states = {peer.rank: self._read(peer.rank) for peer in self._peers}
        self._tell(f"no progress for {idle:.0f} s, so the job ends. {who_hangs(states)}")

    def _died(self, dead: Iterable[Peer]) -> str:
        texts = []
        for peer in dead:
            phase = self._read(peer.rank).get("phase", "")
            host = peer.host.split()[0]
            texts.append(f"rank {peer.rank} (process {peer.pid} on {host}) died {phase}".rstrip())
        return (
            f"{'; '.join(texts)}: it was killed from outside, most often for want of memory (the "
            f"kernel's log, `dmesg`, tells), or crashed, of which its log tells"
        )

    # --- what the ranks tell each other ----------------------------------------------------------

    def _note(self, **more: Any) -> None:
        if self._file < 0:
            return
        text = json.dumps({"phase": self._phase, "host": this_host(), "pid": os.getpid()} | more)
        try:
            os.pwrite(self._file, f"{text}\n".encode(), 0)
            os.ftruncate(self._file, len(text.encode()) + 1)
        except OSError as error:  # a full disk is not for this to complain of
            print(f"watchdog: {error}", file=sys.stderr)

    def _read(self, rank: int) -> dict[str, Any]:
        assert self.folder is not None
        return _read_state(self.folder / str(rank))

    def _claim(self, text: str) -> bool:
        """Whether this rank is the one that says why the job ends."""
        assert self.folder is not None
        try:
            with (self.folder / "ended").open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
        except OSError:
            return True  # the run has ended well, and rank 0 has cleaned up
        return True

    def _tell(self, text: str) -> None:
        if self._claim(text):
            print(f"error: {text}\n{self._hint}", file=self._console, flush=True)

    def _leave(self, seconds: float) -> None:
        """End this process when its main thread has not done so by itself."""
        if not self._stop.wait(seconds):
            sys.stderr.flush()
            os._exit(1)


def _read_state(file: Path) -> dict[str, Any]:
    """What a rank wrote; nothing where it cannot be read."""
    try:
        found: dict[str, Any] = json.loads(file.read_text().splitlines()[0])
    except (OSError, ValueError, IndexError):
        return {}
    return found


def _is_left_over(folder: Path) -> bool:
    """Whether a folder is one of a job that is gone, as far as this machine can know.

    A job ends when one of its ranks is gone; one that has no process here may run elsewhere.
    """
    states = [_read_state(file) for file in folder.iterdir() if file.name.isdigit()]
    here = [state["pid"] for state in states if state.get("host") == this_host()]
    return bool(here) and not any(is_running(pid) for pid in here)


def tell_failure(error: BaseException, rank: int, console: TextIO) -> None:
    """Show the traceback of an unexpected error, unless another rank's end explains it."""
    if not watchdog.explains(error):
        text = "".join(traceback.format_exception(error))
        print(f"rank {rank} failed:\n{text}", file=console, flush=True)


watchdog = Watchdog()
