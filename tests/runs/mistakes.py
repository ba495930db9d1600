"""Mistakes of users against every command: each must end in a few lines that name what is wrong.

    python tests/runs/mistakes.py                    all of them; exit status 1 if one is not answered well
    python tests/runs/mistakes.py --only '^config' --show       by name, with every answer

Answered well: the command ends by itself with status 2, in at most six lines on stderr that name the flag,
the file or the key, without a traceback and before a process group starts. Damaged checkpoints are met
while they are read, and passed over where an older one is whole. What is rightly taken has its reason.
Each mistake (`tests/helpers/mistakes.py`) runs in a child forked from one process that has imported all.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # In place of this folder, where tests/data would hide the package data.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

import tests.helpers.preload  # noqa: F401 - imported before the children are forked
from post_training.machine import environment
from tests.helpers.launch import ENVIRONMENT, ROOT
from tests.helpers.mistakes import KINDS, TOOLS, Case, Place

LIMIT, LINES, WIDTH = 120.0, 6, 1000
"""Seconds after which a command hangs; lines of an answer, and letters of one."""
STARTED = "a process group is started"
DONE = {
    "finetune": "done: ",
    "preview": "the run",
    "export_hf": "logits agree",
    "translate_config": "written by",
}
"""What a command prints at its end, which status 0 alone does not prove."""
OUTCOMES = "traceback silent hang wrong-status unnamed long late refused taken".split()


def fault(case: Case, status: int | None, said: str, shown: str) -> str | None:
    """What is wrong with an answer on stderr, and what is shown on stdout; None where it is good."""
    # What transformers warns of by itself is not ours.
    lines = [x for x in said.splitlines() if x.strip() and not x.startswith("[transformers]")]
    if status is None:
        return "hang"
    if status < 0 or "Traceback (most recent" in said:
        return "traceback"
    if not status:
        return None if case.taken and DONE.get(case.tool, "") in said + shown else "silent"
    if not lines:
        return "silent"
    if STARTED in said and not case.late:
        return "late"
    if status != 2 and not (case.late and status == 1):
        return "wrong-status"
    if not re.search(case.names, said):
        return "unnamed"
    # A run that stops itself tells where in some lines.
    long = len(lines) > LINES or max(map(len, lines)) > WIDTH
    return "long" if long and status == 2 else None


def _become(case: Case, console: Path) -> None:
    """In a forked child: run one command, and end."""
    both = console if case.tool in ("launch", "plan") else console.with_suffix(".out")
    for number, file in enumerate((Path(os.devnull), both, console)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.chdir(ROOT)
    os.environ.update(
        ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"} | case.variables
    )
    sys.argv = [f"{case.tool}.py", *case.words]
    start = torch.distributed.init_process_group

    def told(*args: Any, **kwargs: Any) -> Any:
        print(STARTED, file=sys.stderr, flush=True)
        return start(*args, **kwargs)

    setattr(torch.distributed, "init_process_group", told)  # noqa: B010
    status: Any = 1
    try:
        environment.stand_alone()  # as when a command is imported
        module = importlib.import_module(
            case.tool if case.tool == "finetune" else f"scripts.{case.tool}"
        )
        status = (
            module.main(list(case.words)) if module.main.__code__.co_argcount else module.main()
        )
    except SystemExit as ended:
        status = ended.code
    except BaseException:  # noqa: BLE001 - as the interpreter would print it
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def ended(
    cases: list[Case], folder: Path, jobs: int
) -> Iterator[tuple[Case, int | None, str, str]]:
    """Run cases, some at a time: each with its status, None for one that hangs, stderr and stdout."""
    waiting = list(enumerate(cases))[::-1]
    running: dict[int, tuple[Case, Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            number, case = waiting.pop()
            console = folder / f"{number}.console"
            for file in (console, console.with_suffix(".out")):
                file.write_text("")
            if not (pid := os.fork()):
                os.setsid()
                _become(case, console)
            running[pid] = case, console, time.monotonic() + LIMIT
        for pid, (case, console, end) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and time.monotonic() < end:
                continue
            if not done:
                os.killpg(pid, 9)
                os.waitpid(pid, 0)
            del running[pid]
            yield (
                case,
                os.waitstatus_to_exitcode(status) if done else None,
                console.read_text(errors="replace"),
                console.with_suffix(".out").read_text(errors="replace"),
            )
        time.sleep(0.01)


def main() -> int:
    """Run the mistakes and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="cases by name")
    parser.add_argument("--show", action="store_true", help="print every answer, not only faults")
    parser.add_argument("--lines", type=int, default=3, help="of an answer that are printed")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    for tool in TOOLS:
        importlib.import_module(f"scripts.{tool}")
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        for kind in KINDS:
            cases = [case for case in kind(place) if re.search(options.only, case.name)]
            for case, status, said, shown in ended(cases, Path(folder), options.jobs):
                found = fault(case, status, said, shown)
                outcome = found or ("refused" if status else "taken")
                counts[outcome] += 1
                if found or options.show:
                    print(f"{outcome:13}{status}  {case.name}  {case.taken if not status else ''}")
                    for line in said.splitlines()[-options.lines :]:
                        print(f"    {line[:240]}", flush=True)
    print("".join(f"{outcome:14}{counts[outcome]}\n" for outcome in OUTCOMES), end="")
    wrong = counts.total() - counts["refused"] - counts["taken"]
    print(f"{counts.total()} mistakes, {wrong} not answered well")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
