import inspect
import os

import pytest

from post_training.platform import cuda_connections

NAME = cuda_connections.NAME


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv(NAME, "x")  # so that the test's end restores what was there
    monkeypatch.delenv(NAME)


@pytest.mark.parametrize(("fsdp2", "expected"), [(False, "1"), (True, None)])
def test_choice(environment, fsdp2, expected):
    cuda_connections.choose(fsdp2)
    assert os.environ.get(NAME) == expected


def test_what_the_user_has_set_stays(environment, monkeypatch):
    monkeypatch.setenv(NAME, "8")
    cuda_connections.choose(False)
    assert os.environ[NAME] == "8"


def test_still_needed_upstream_refuses_fsdp2_with_one_connection():
    from megatron.training import arguments

    source = inspect.getsource(arguments.validate_args)
    assert f"os.environ.get('{NAME}') != \"1\"" in source
