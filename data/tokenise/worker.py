"""A worker process that tokenises chunks: ``python -m data.tokenise.worker``.

Reads pickled messages from standard input and writes pickled answers to standard output: first the
options, then chunk after chunk. It is started as a program, not forked: forking a process that has
threads (a tokenizer's, PyTorch's) can hang, and spawning through multiprocessing would run the
training script's imports again in every worker.
"""

from __future__ import annotations

import gc
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from data.documents.shard import Shard
from data.errors import DataError
from data.sources.chunks import Chunk
from data.tokenise.options import TokenizeOptions
from data.tokenise.row_tokenizer import RowTokenizer

_COLLECT_EVERY = 100
_HEADER = struct.Struct("<Q")


class WorkerPool:
    """Worker processes that tokenise chunks; results come back in the order of the chunks.

    Args:
        options: What the workers do.
        count: How many.
        many: As for ``RowTokenizer``.
    """

    def __init__(self, options: TokenizeOptions, count: int, many: bool = False) -> None:
        self.count = count
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._processes = [_start(options, many) for _ in range(count)]
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(count)

    def map(self, chunks: Iterator[Chunk]) -> Iterator[Shard]:
        """Tokenise chunks, a bounded number at a time.

        Raises:
            DataError: a worker died.
        """
        waiting: list[Future[Shard]] = []
        for chunk in chunks:
            waiting.append(self._threads.submit(self._one, chunk))
            if len(waiting) > 2 * self.count:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()

    def close(self) -> None:
        """Stop the workers."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None and not pipe.closed:
                    pipe.close()

    def _one(self, chunk: Chunk) -> Shard:
        process = self._idle.get()
        try:
            assert process.stdin is not None and process.stdout is not None
            _send(process.stdin, chunk)
            shard: Shard = _receive(process.stdout)
        except (OSError, EOFError) as error:
            raise DataError(
                f"{chunk.name}: the worker process that read it ended (exit code "
                f"{process.poll()}); it may have run out of memory. Run again to continue from "
                "here, with fewer --data-workers if it happens again."
            ) from error
        finally:
            self._idle.put(process)
        return shard


def _start(options: TokenizeOptions, many: bool) -> subprocess.Popen[bytes]:
    here = str(Path(__file__).resolve().parents[2])
    environment = dict(os.environ)
    # One thread a worker: the workers are the parallelism.
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["PYTHONPATH"] = os.pathsep.join([here, *(p for p in sys.path if p)])
    process = subprocess.Popen(
        [sys.executable, "-m", "data.tokenise.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert process.stdin is not None
    _send(process.stdin, (options, many))
    return process


def _send(pipe: IO[bytes], message: Any) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(_HEADER.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    header = pipe.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise EOFError
    (size,) = _HEADER.unpack(header)
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)  # noqa: S301 - from our own parent or child process


def main() -> None:
    """Serve until standard input ends."""
    # Whatever else prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Rows make no cycles, and looking for some takes a fifth of the time.
    gc.disable()
    try:
        tokenizer = RowTokenizer(*_receive(sys.stdin.buffer))
        for number in count(1):
            _send(answers, tokenizer.chunk(_receive(sys.stdin.buffer)))
            if number % _COLLECT_EVERY == 0:
                gc.collect()
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


if __name__ == "__main__":
    main()
