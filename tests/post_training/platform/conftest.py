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


def pytest_collection_modifyitems(items):
    """Tests that ask upstream are slow: they start an interpreter."""
    for item in items:
        if "upstream" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
