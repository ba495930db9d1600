"""What upstream does without the platform layer."""

import json

import pytest

from tests.helpers.launch import run_script


@pytest.fixture(scope="session")
def upstream():
    """Answers of `tests/helpers/upstream_probe.py`, by subject: one interpreter for all of them."""
    done = run_script("tests/helpers/upstream_probe.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
