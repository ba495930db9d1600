import re
import time

import pytest

from post_training.start_up import StartUpClock
from tests.helpers.launch import run_script


def test_phases_add_up_and_end_with_the_first_step():
    clock = StartUpClock()
    clock.mark("imports")
    assert clock.phases["imports"] > 0.1, "counted from the start of the process"
    time.sleep(0.05)
    clock.mark("data")
    assert 0.05 <= clock.phases["data"] < 5
    line = clock.first_step()
    assert line is not None and re.search(r"imports .* s, data 0\.\d s, first step 0\.0 s", line)
    clock.mark("data")
    assert clock.first_step() is None and clock.phases["data"] < 5


@pytest.mark.slow
def test_the_log_tells_where_the_time_to_the_first_step_went(hf_model, chat_data, tmp_path):
    begin = time.monotonic()
    done = run_script(
        "finetune.py",
        *("--hf-model", str(hf_model("qwen3")), "--finetune-data-files", str(chat_data.file)),
        *("--output-dir", str(tmp_path / "out"), "--train-iters", "1", "--seq-length", "128"),
    )
    took = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "out" / "train.log").read_text()
    (line,) = re.findall(r"first step ([\d.]+) s after the launch: (.*)", log)
    phases = {name: float(s) for name, s in re.findall(r"([a-z -]+?) ([\d.]+) s", line[1])}
    assert list(phases) == [
        *("imports", " arguments", " data", " output folder"),
        *(" process group and model", " checks", " first step"),
    ]
    assert sum(phases.values()) == pytest.approx(float(line[0]), abs=0.5)
    assert float(line[0]) < took
