import importlib.util
import subprocess
import sys

import pytest

from post_training.arguments.completion import _check_wandb
from post_training.errors import SetupError
from tests.helpers.launch import LIMIT

CHECK = """
from post_training.errors import SetupError
from post_training.arguments.completion import _check_wandb
try:
    _check_wandb()
    print("good")
except SetupError as error:
    print(error)
"""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_package_is_said():
    with pytest.raises(SetupError, match="not installed"):
        _check_wandb()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "WANDB_API_KEY"),
        ({"WANDB_MODE": "offline"}, "good"),
        ({"WANDB_API_KEY": "0" * 40}, "good"),
    ],
)
def test_credentials_are_looked_for(tmp_path, variables, expected):
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), **variables}
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert expected in done.stdout
