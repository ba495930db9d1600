"""Whether a process runs."""

import os
import subprocess
import sys
import time

from post_training.machine.processes import is_running


def test_running_processes():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1200)"])
    assert is_running(child.pid)
    child.kill()
    while is_running(child.pid):
        time.sleep(0.01)
    child.poll()
    # A zombie until here, which must not pass for running.
    child.wait()
    assert not is_running(child.pid)
    assert is_running(os.getpid())
