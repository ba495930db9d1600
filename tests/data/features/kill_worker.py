"""Kills writers of features before each of their calls that change the disk, and goes on with the folder.

    python -m tests.data.features.kill_worker FOLDER

The writers are forked from this process, which has imported everything already.
"""

import contextlib
import functools
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

from tests.data.features.folders import make_documents, tree, write

CALLS = ("fsync", "link", "mkdir", "rename", "replace", "rmdir", "unlink")


def killed(folder, documents, at):
    """Write in a process that is killed before its call number `at`; whether it was."""
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
        return status != 0
    left = iter(range(at - 1, -1, -1))

    def count(call, *args, **options):
        if next(left, -1) == 0:
            if call is os.ftruncate:  # of what is being written a half has reached the disk
                with contextlib.suppress(OSError):
                    call(args[0], os.fstat(args[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return None if call is os.ftruncate else call(*args, **options)

    for name in CALLS:
        real = os.ftruncate if name == "fsync" else getattr(os, name)
        setattr(os, name, functools.partial(count, real))
    try:
        write(folder, documents)
        os._exit(0)
    finally:  # not on in the code of the process that it was forked from
        traceback.print_exc()
        os._exit(1)


def main(root):
    documents = make_documents(12)
    os.fsync = lambda fd: None  # a kill leaves what was written, unlike a loss of power
    write(root / "whole" / "train", documents)
    expected = tree(root / "whole")
    at = 1
    while killed(root / "killed" / "train", documents, at):
        killed(root / "killed" / "train", documents, at)  # and what goes on once more
        write(root / "killed" / "train", documents)
        found = tree(root / "killed")
        assert found == expected, (at, found.keys() ^ expected.keys())
        shutil.rmtree(root / "killed")
        at += 1
    print(at - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
