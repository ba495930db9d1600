"""A rank that hangs or dies ends the whole job, with one message that says which rank and where.

Each rank has a thread that looks at how long ago its main thread made progress (`beat`). Ranks tell each
other what they know through files (`rank_files`).

A rank whose process is gone is noticed at once by the others on its machine. That matters most on CUDA,
where the others wait in a collective without an end; gloo raises an error that names no rank.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path
from typing import Any, TextIO

import torch

from post_training.arguments.completion import PATIENCE
from post_training.job.hang_report import hang_report, place_of
from post_training.job.rank_files import PREFIX, RankFiles, remove_left_over
from post_training.machine.processes import PARENT, is_running, this_host

# Seconds that a rank is given to say where it stands, once it has heard of an alarm.
ANSWER_SECONDS = 10.0
# Seconds that the main thread is given to end by itself, once it is known that the job ends.
LAST_SECONDS = 5.0
# Seconds that the interpreter is given to end after an error, once that is told.
EXIT_SECONDS = 15.0

_COMMUNICATION = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out|socket|TCPStore",
    re.IGNORECASE,
)


class Watchdog:
    """Watches this rank and the others; the one instance is `watchdog`."""

    def __init__(self) -> None:
        self.rank, self.limit = 0, 0.0
        self.files: RankFiles | None = None
        """What the ranks tell each other, once they have met."""
        self._output = Path()
        self._console: TextIO = sys.stderr
        self._hint = ""
        self._phase, self._patient_beats = "not started", math.inf
        self._last = time.monotonic()
        self._neighbours: dict[int, int] = {}
        """Process numbers of the other ranks of this machine, by rank."""
        self._launcher = 0
        """The process that started this rank, under torchrun: it would pass signals on."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # --- called by the main thread ---------------------------------------------------------------

    def start(self, args: argparse.Namespace, console: TextIO) -> None:
        """Watch from now on, unless `--hang-timeout 0`.

        Args:
            args: validated arguments.
            console: where messages go.
        """
        self.limit = args.hang_timeout
        self._launcher = PARENT if "TORCHELASTIC_RUN_ID" in os.environ else 0
        if self.limit <= 0:
            threading.Thread(target=self._follow, name="launcher", daemon=True).start()
            return
        self.rank, self._console, self._output = args.rank, console, Path(args.output_dir)
        self._hint = (
            f"to continue from the newest checkpoint in {args.save}, give the same command again"
        )
        self.beat("in set-up", patient=True)
        faulthandler.enable(all_threads=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def meet(self) -> None:
        """Get to know the other ranks, once there is a process group; every rank calls it."""
        if self._thread is None:
            return
        here, token = this_host(), uuid.uuid4().hex[:12]
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (here, os.getpid(), token))
        folder = self._output / f"{PREFIX}{everyone[0][2]}"
        if self.rank == 0:
            remove_left_over(self._output)
            folder.mkdir()
        torch.distributed.barrier()
        files = RankFiles(folder, self.rank, len(everyone))
        files.note(self._phase)
        torch.distributed.barrier()  # from here on a missing file means an ended rank
        self._neighbours = {
            rank: pid
            for rank, (host, pid, _) in enumerate(everyone)
            if host == here and rank != self.rank
        }
        self.files = files

    def beat(
        self, phase: str | None = None, *, patient: bool = False, patient_beats: float = math.inf
    ) -> None:
        """Say that there is progress.

        Args:
            phase: what comes next, such as `at step 5`; None where it is more of the same.
            patient: it may take long.
            patient_beats: how many beats within the phase it takes until nothing may take long any more.
        """
        self._last = time.monotonic()
        self._patient_beats -= 1
        if phase is not None:
            self._phase, self._patient_beats = phase, patient_beats if patient else 0
            if self.files is not None:
                self.files.note(phase)

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
        self._thread.join(1.0)  # to one that still watches, a missing file is a rank that died
        if self.files is not None:
            self.files.leave()
        self._thread = None

    def explains(self, error: BaseException) -> bool:
        """Whether another rank is why this one failed; then the reason has been told once.

        Otherwise the others are told that it is this rank that failed.
        """
        if self.files is None:
            return False
        if _COMMUNICATION.search(f"{type(error).__name__} {error}"):
            deadline = time.monotonic() + LAST_SECONDS
            while time.monotonic() < deadline:
                self._tell_of_the_dead(self.files)
                if self.files.ended.exists():
                    return True
                time.sleep(0.1)
        self.fail()
        return False

    def fail(self) -> bool:
        """Let the others know that the job ends because of this rank, which says why by itself.

        Returns:
            Whether no other rank has said so before, as far as that is known.
        """
        return self.files is None or self.files.claim(f"rank {self.rank} failed")

    def job_ends(self) -> bool:
        """Whether it is known already why the job ends: a rank of this machine is gone, or has failed."""
        files = self.files
        return files is not None and (files.ended.exists() or bool(self.dead(files)))

    def dead(self, files: RankFiles) -> list[int]:
        """Ranks of this machine whose processes are gone without having said so."""
        gone = [rank for rank, pid in self._neighbours.items() if not is_running(pid)]
        return [rank for rank in gone if not files.has_ended(rank)]

    # --- called by the thread --------------------------------------------------------------------

    def _watch(self) -> None:
        looked = 0.0
        while not self._stop.wait(min(1.0, self.limit / 20)):
            # Should a call hold the interpreter so that this thread never runs again, a C thread tells.
            faulthandler.dump_traceback_later(PATIENCE * self.limit, exit=True)
            if self._look_for_launcher() and self.files is None:
                # The ranks have not met, and may wait for a store that went with the launcher.
                if not self._stop.wait(LAST_SECONDS) and self.files is None:
                    os._exit(128 + signal.SIGTERM)
            now = time.monotonic()
            files = self.files
            if self._stale(now):
                self._alarm(files)
            if files is None:
                continue
            with contextlib.suppress(OSError):  # what the disk does is no reason to stop watching
                if self._tell_of_the_dead(files) or now - looked >= self._look_at_files():
                    looked = now
                    if files.ended.exists() and not self._stop.wait(LAST_SECONDS):
                        os._exit(1)  # the main thread has not ended by itself
                    if files.alarm.exists():
                        self._alarm(files)

    def _look_for_launcher(self) -> bool:
        if self._launcher in (0, os.getppid()):
            return False
        self._launcher = 0
        # Nobody is left to say it: save and end. To the main thread, whose waiting it ends.
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)
        return True

    def _follow(self) -> None:
        """With `--hang-timeout 0` nothing else is watched."""
        while self._launcher:
            self._look_for_launcher()
            time.sleep(1.0)

    def _look_at_files(self) -> float:
        """Every so many seconds."""
        return min(10.0, self.limit / 30)

    def _stale(self, now: float) -> bool:
        return now - self._last > self.limit * (PATIENCE if self._patient_beats > 0 else 1)

    def _alarm(self, files: RankFiles | None) -> None:
        """Tell where this rank stands; the first to do so then tells about all. Does not return."""
        try:
            self._tell_where(files)
        finally:
            os._exit(1)  # whatever the disk, the log or the folder does

    def _tell_where(self, files: RankFiles | None) -> None:
        idle = f"no progress for {time.monotonic() - self._last:.0f} s"
        place = place_of(sys._current_frames().get(threading.main_thread().ident or 0))
        with contextlib.suppress(OSError):  # a full disk
            print(f"rank {self.rank} {self._phase}: {idle}", file=sys.stderr)
            faulthandler.dump_traceback(all_threads=True)
        alone = f"error: rank {self.rank} {self._phase}: {idle}, at {place}"
        if files is None:
            text = f"{alone}. A rank that does not say so has not come so far, or is not there"
            return print(text, file=self._console, flush=True)
        try:
            files.alarm.touch()
        except OSError:  # nothing to be heard of the others, nor to be told to them
            return print(alone, file=self._console, flush=True)
        files.note(self._phase, place=place)
        deadline = time.monotonic() + ANSWER_SECONDS + 2 * self._look_at_files()
        while True:
            states = {rank: files.read(rank) for rank in range(files.world)}
            if all("place" in state for state in states.values()) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        self._tell(files, f"{idle}, so the job ends. {hang_report(states)}")

    def _tell_of_the_dead(self, files: RankFiles) -> bool:
        dead = self.dead(files)
        if dead:
            texts = [
                f"rank {rank} (process {self._neighbours[rank]} on {os.uname().nodename}) "
                f"died {files.read(rank).get('phase', '')}".rstrip()
                for rank in dead
            ]
            self._tell(
                files,
                f"{'; '.join(texts)}: it was killed from outside, most often for want of memory (the "
                f"kernel's log, `dmesg`, tells), or crashed, of which its log tells",
            )
        return bool(dead)

    def _tell(self, files: RankFiles, text: str) -> None:
        if files.claim(text):
            print(f"error: {text}\n{self._hint}", file=self._console, flush=True)


def tell_failure(error: BaseException, rank: int, console: TextIO) -> None:
    """Show the traceback of an unexpected error, unless another rank's end explains it."""
    if not watchdog.explains(error):
        text = "".join(traceback.format_exception(error))
        print(f"rank {rank} failed:\n{text}", file=console, flush=True)


watchdog = Watchdog()
