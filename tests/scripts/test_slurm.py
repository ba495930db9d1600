"""The batch scripts on a real scheduler: `tests/helpers/scheduler.py` starts and ends one for each test."""

import os
import re
import signal
import sys
from dataclasses import replace

import pytest

from tests.helpers import faults
from tests.helpers.held_tree import FAULT, held_tree
from tests.helpers.launch import ROOT, finetune
from tests.helpers.reference import Recipe
from tests.helpers.scheduler import installed, scheduler, wait_for
from tests.runs.resume import DROPOUT, numbers

STEPS = 12
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
NOT_HERE = "slurm-wlm and munge are not installed"
pytestmark = pytest.mark.slow


@pytest.fixture
def cluster():
    if not installed():
        if os.environ.get("SFT_REQUIRE_SLURM"):
            pytest.fail(NOT_HERE)
        pytest.skip(NOT_HERE)
    with scheduler() as made:
        yield made


class Submitted:
    """A job of `finetune.sbatch` in a folder of its own."""

    def __init__(self, cluster, folder, *words, command=("sbatch",), **variables):
        self.cluster, self.folder = cluster, folder
        script = str(ROOT / "scripts/slurm/finetune.sbatch")
        at = words.index("--") if "--" in words else 0
        options, flags = words[:at], words[at + 1 :]
        folder.mkdir(exist_ok=True)
        line = [*command, *options, f"--chdir={folder}", script, *flags]
        self.id = cluster.call(*line, **variables).rpartition(" ")[2]

    @property
    def lines(self):
        """The batch log."""
        return (self.folder / f"slurm-{self.id}.out").read_text().splitlines()

    @property
    def logs(self):
        """What the nodes' logs hold."""
        return "".join(p.read_text() for p in sorted(self.folder.glob(f"slurm-{self.id}/*.log")))

    def end(self):
        """Wait for its end: the state, the exit status and the number of restarts."""
        wait_for("the end", lambda: self.cluster.field(self.id, "JobState") in ENDED)
        exit_code = self.cluster.field(self.id, "ExitCode").partition(":")[0]
        state, restarts = (self.cluster.field(self.id, name) for name in ("JobState", "Restarts"))
        return state, int(exit_code), int(restarts)

    def reached(self, output, step):
        """Wait until the run has written a step down."""

        def there():
            assert self.cluster.field(self.id, "JobState") not in ENDED, self.logs
            file = output / "metrics.jsonl"
            text = file.read_text() if file.is_file() else ""
            return re.search(rf'"iteration": {step}\b.*\n', text)

        wait_for(f"step {step}", there)

    def heard(self):
        """Wait until rank 0 has heard the scheduler's signal."""
        wait_for("SIGTERM", lambda: "SIGTERM: saving" in self.logs)


@pytest.fixture
def words(hf_model, chat_data):
    model = ["--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)]
    return [*model, *Recipe(steps=STEPS).flags(), *DROPOUT, "--no-progress"]


def test_a_job_that_is_cancelled_requeued_and_loses_a_node_trains_as_if_uninterrupted(
    cluster, words, tmp_path
):
    hold, output = tmp_path / "hold", tmp_path / "out"
    variables = {"SFT_ROOT": str(held_tree(tmp_path / "tree")), faults.HOLD: str(hold)}
    variables[FAULT] = "hold_where_told"
    two = ["--nodes=2", "--exclude=n3", "--", *words, "--output-dir", str(output)]
    tracker = output / "checkpoints/latest_checkpointed_iteration.txt"

    hold.write_text("3")
    job = Submitted(cluster, tmp_path / "job", *two, **variables)
    job.reached(output, 2)
    cluster.call("scancel", job.id)
    job.heard()
    hold.write_text("6")
    assert job.end()[0] == "CANCELLED"
    wait_for("the last line", lambda: "Slurm ends this start" in job.lines[-1])
    assert "stopped after step 3 (SIGTERM received)" in job.lines[-1] and tracker.read_text() == "3"
    assert "2 processes on 2 nodes: an all-reduce takes" in job.logs

    variables["SFT_HEALTH_CHECK"] = "0"
    job = Submitted(cluster, tmp_path / "job", *two, **variables)
    job.reached(output, 5)
    cluster.call("scancel", "--batch", "--signal=USR1", job.id)
    job.heard()
    hold.write_text("9")
    job.reached(output, 8)
    requeued = next(line for line in job.lines if line.startswith("restart 0: "))
    assert "stopped after step 6" in requeued and requeued.endswith("; requeued")
    # A node is lost: its daemon dies, and with it what Slurm knows of the ranks there, which live on.
    cluster.daemons["n2"].send_signal(signal.SIGKILL)
    cluster.daemons["n2"].wait()
    cluster.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")
    # The rank on n1 is told; rank 0, which alone would say so, may be the one on n2.
    wait_for("its end", lambda: "DUE TO NODE FAILURE" in job.logs)
    hold.write_text("0")
    wait_for("a new start", lambda: cluster.field(job.id, "JobState") == "PENDING")
    cluster.start_node("n2")
    state, status, restarts = job.end()
    assert (state, status) == ("COMPLETED", 0) and restarts >= 2, job.lines
    assert job.lines[-1] == f"restart {restarts}: complete; the job ends"
    straight = finetune(tmp_path / "straight", *words, world=2).ok()
    run = replace(straight, folder=output)
    assert numbers(run) == numbers(straight) and len(run.steps) == STEPS


def test_a_mistake_a_failing_rank_and_no_progress_end_the_job(cluster, words, tmp_path):
    variables = {"SFT_ROOT": str(held_tree(tmp_path / "tree")), FAULT: "kill_at_step_1"}
    variables |= {"SFT_HEALTH_CHECK": "0", "SFT_PROCESSES_PER_NODE": "2"}

    def job(name, *options, flags=(), **how):
        output = ["--output-dir", str(tmp_path / name)]
        line = [*options, "--", *words, *output, *flags]
        return Submitted(cluster, tmp_path / f"{name}.job", *line, **how, **variables)

    submit = [sys.executable, "-m", "scripts.launchers.slurm", "submit"]
    submit += ["--nodes=1", "--processes-per-node=2", f"--data-option=--chdir={tmp_path}"]
    three = ["--tensor-model-parallel-size", "3"]
    assert job("refused", flags=three, command=submit).id == "", "here, and not on the nodes"
    assert cluster.call("squeue", "-h") == ""
    mistake = job("mistake", flags=three)
    failing = job("failing", "--no-requeue", command=submit)
    stuck = job("stuck")
    large = job("large", SFT_GPU_TYPE="1gib")
    assert mistake.end() == ("FAILED", 2, 0)
    assert "its log has the line: error: " in mistake.lines[-1]
    assert "cannot be divided by tensor 3" in mistake.lines[-1]
    assert mistake.lines[-1].endswith("; the job is not requeued")
    assert large.end() == ("FAILED", 2, 0)
    assert "the layout does not fit: pipeline stage 0 needs about" in large.logs
    assert failing.end() == ("FAILED", 1, 0)
    assert any("60 rows read" in log.read_text() for log in tmp_path.glob("slurm-*.out"))
    assert "rank 1 (process" in failing.logs and "SIGKILL" in failing.logs
    assert failing.lines[-1].endswith("not requeued: submitted with --no-requeue")
    assert stuck.end() == ("FAILED", 3, 2)
    assert "two restarts found no newer checkpoint than that of step 0" in stuck.lines[-1]
