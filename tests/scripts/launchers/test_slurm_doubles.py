"""The batch job and its submission where the scheduler's commands are doubles on PATH."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from scripts.launchers import slurm
from tests.helpers.launch import ROOT

DOUBLES = {
    "scontrol": """
case "$1 $2" in
"show hostnames") echo "$SLURM_JOB_NODELIST" ;;
"show node") echo "NodeName=n1 NodeAddr=127.0.0.1" ;;
"show job")
    if [[ -e $DOUBLES/silent ]]; then rm "$DOUBLES/silent"; exit 1; fi
    end=Tomorr; [[ ${SLURM_TIME_FORMAT:-} != standard ]] || end=2099-01-01T00:00:00
    echo "JobId=$3 JobState=RUNNING Requeue=1 Restarts=${RESTARTS:-0} EndTime=$end" ;;
"requeue "*) [[ ! -e $DOUBLES/refuses ]] ;;
esac
""",
    "srun": """
printf '%s\\n' "$*" >> "$DOUBLES/heard.srun"
case "$*" in
*"--only prepare") echo '{"outcome": "prepared", "progress": 5, "folder": "out"}' > "$SFT_OUTCOME" ;;
*) exit 1 ;;
esac
""",
    "sbatch": """
printf '%s\\n' "$*" >> "$DOUBLES/heard.sbatch"
case "$*" in *--wrap*) echo "7;cluster" ;; *) exit 1 ;; esac
""",
    "scancel": """
printf '%s\\n' "$*" >> "$DOUBLES/heard.scancel"
""",
}


@pytest.fixture
def doubles(tmp_path, monkeypatch):
    """A folder of doubles that is on PATH; what they hear lies in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in DOUBLES.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("DOUBLES", str(folder))
    return folder


@pytest.fixture
def job(doubles, tmp_path):
    """Runs one start of the job 12: its status, and the lines of its log."""

    def run(*flags, folder="jobs 50%j", **variables):
        (tmp_path / folder).mkdir(exist_ok=True)
        words = [sys.executable, "-m", "scripts.launchers.slurm", "run", "finetune.py", *flags]
        place = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1", "SFT_HEALTH_CHECK": "0"}
        place |= {"PYTHONPATH": str(ROOT), "SLURM_TIME_FORMAT": "relative"}
        done = subprocess.run(
            words,
            env={**os.environ, **place, **variables},
            cwd=tmp_path / folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout.splitlines()

    job: Any = run
    job.progress = tmp_path / "jobs 50%j/slurm-12/progress.json"
    return job


def test_the_steps_of_an_older_job_of_the_same_number_do_not_count(job):
    job.progress.parent.mkdir(parents=True)
    job.progress.write_text("[500, 500]")
    assert job() == (
        1,
        ["restart 0: the run ended with status 1, before it was complete; requeued"],
    )
    assert json.loads(job.progress.read_text()) == [5]


def test_restarts_are_counted_where_the_variable_is_missing_and_by_what_can_be_read(job):
    job()
    status, lines = job(RESTARTS="1")
    assert status == 1 and lines[-1].startswith("restart 1: the run ended")
    assert job(RESTARTS="2")[0] == 3
    job.progress.write_text("[5, ")
    assert job(SLURM_RESTART_COUNT="3")[0] == 1


def test_a_folder_with_a_percent_sign_is_no_pattern_of_srun(job, doubles):
    job()
    outputs = [
        line for line in (doubles / "heard.srun").read_text().splitlines() if "--output" in line
    ]
    assert len(outputs) == 2 and all("/jobs 50%%j/slurm-12/" in line for line in outputs)


def test_a_controller_that_is_silent_for_a_moment_ends_no_job(job, doubles, monkeypatch):
    monkeypatch.setattr(slurm, "WAIT", 0.0)
    (doubles / "silent").touch()
    assert slurm.show("job", "12")["EndTime"] == "2099-01-01T00:00:00"
    (doubles / "refuses").touch()
    assert job()[1][-1].endswith("; scontrol requeue failed: submit the same again")


@pytest.mark.parametrize(
    ("flags", "variables", "told"),
    [
        ((), {"SFT_PROCESSES_PER_NODE": "two"}, "SFT_PROCESSES_PER_NODE=two: expects"),
        ((), {"SFT_PROCESSES_PER_NODE": "0"}, "SFT_PROCESSES_PER_NODE=0: expects"),
        (("--help",), {}, "--help: nothing is trained with it"),
        (("--only=check",), {}, "--only=check: nothing is trained with it"),
    ],
)
def test_what_can_never_run_is_not_requeued(job, doubles, flags, variables, told):
    status, lines = job(*flags, **variables)
    assert status == 2 and told in lines[-1] and not (doubles / "heard.srun").exists()


def test_the_data_job_ends_with_the_run_that_is_not_submitted(doubles, monkeypatch):
    run = subprocess.run
    here = lambda words, **more: run(["true"] if words[0] == sys.executable else words, **more)  # noqa: E731
    monkeypatch.setattr(subprocess, "run", here)
    words = ["--nodes=2", "--dependency=afterany:3", "a.sbatch", "--output-dir", "x"]
    assert slurm.submit(words) == 1
    assert "--dependency=afterok:7,afterany:3 " in (doubles / "heard.sbatch").read_text()
    assert (doubles / "heard.scancel").read_text() == "7\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nodes", "0"], "at least 1"),
        (["--nodes", "2-4"], "invalid int value"),
        (["--nodes", "2", "--gres=gpu:8"], "--gres=gpu:8: say GPUs by --gpus-per-node"),
        (["--nodes", "2", "-G", "8"], "-G: say GPUs by --gpus-per-node"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(capsys, words, told):
    with pytest.raises(SystemExit) as ended:
        slurm.submit([*words, "a.sbatch"])
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and told in shown and shown.count("\n") == 1
