import io
import os
import signal
from argparse import Namespace
from types import SimpleNamespace

import pytest
from megatron.training import global_vars

from post_training.job import signals
from post_training.job.signals import GracefulExit
from post_training.job.watchdog import watchdog


@pytest.fixture
def megatron(monkeypatch):
    """Megatron's handler; the process's own handlers come back after the test."""
    handler = SimpleNamespace(_signal_received=False)
    monkeypatch.setattr(global_vars, "get_signal_handler", lambda: handler)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield handler
    for number, each in zip(numbers, before, strict=True):
        signal.signal(number, each)


class _Interrupted(io.FileIO):
    """A file in whose first write, as of a progress bar, a signal arrives."""

    def write(self, data):
        if b"bar" in bytes(data):
            signal.raise_signal(signal.SIGTERM)
        return super().write(data)


def test_a_signal_in_the_middle_of_a_write_to_the_console(megatron, tmp_path):
    raw = _Interrupted(tmp_path / "console", "w")
    console = io.TextIOWrapper(io.BufferedWriter(raw), line_buffering=True)
    graceful = GracefulExit(Namespace(rank=0), console)
    print("bar", file=console)
    assert megatron._signal_received and graceful.received == signal.SIGTERM
    assert (tmp_path / "console").read_text().split("\n")[1:] == [
        "SIGTERM: saving after this step; Ctrl-C after 5 s leaves without saving",
        "bar",
        "",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_console_that_is_no_file(megatron, rank):
    console = io.StringIO()
    GracefulExit(Namespace(rank=rank), console)
    os.kill(os.getpid(), signal.SIGINT)
    assert megatron._signal_received
    assert ("SIGINT: saving" in console.getvalue()) == (rank == 0), "once, not by each process"


def test_a_console_that_cannot_be_written_to_is_no_reason_to_fail(megatron):
    reader, writer = os.pipe()
    os.close(reader)  # a terminal that is gone
    GracefulExit(Namespace(rank=0), open(writer, "w"))
    signal.raise_signal(signal.SIGTERM)
    assert megatron._signal_received


def test_repeats_are_one_signal_and_only_an_impatient_ctrl_c_leaves(megatron, monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog, "stop", lambda: ended.append("stop"))
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    GracefulExit(Namespace(rank=1), io.StringIO())
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # as of srun and of a launcher
        os.kill(os.getpid(), number)
    assert megatron._signal_received and ended == []
    monkeypatch.setattr(signals, "ONE_SIGNAL", 0.0)
    os.kill(os.getpid(), signal.SIGTERM)  # a scheduler's, at its time limit
    assert ended == []
    os.kill(os.getpid(), signal.SIGINT)
    assert ended == ["stop", signal.SIGINT]


class _Finaliser:
    """Python prints and forgets what is raised while it is deleted."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_a_finaliser_swallows_is_heard_later(megatron, monkeypatch):
    monkeypatch.setattr(signals, "_interrupted", False)
    signals.raise_if_interrupted()
    signal.signal(signal.SIGINT, signals.interrupt)
    thing = _Finaliser()
    del thing
    for later in (
        signals.raise_if_interrupted,
        lambda: GracefulExit(Namespace(rank=1), io.StringIO()),
    ):
        with pytest.raises(KeyboardInterrupt):
            later()
