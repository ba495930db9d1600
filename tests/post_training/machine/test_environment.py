import inspect
import os

import pytest

from post_training.machine import environment

NAME = environment.NAME


@pytest.fixture
def unset(monkeypatch):
    monkeypatch.setenv(NAME, "x")  # so that the test's end restores what was there
    monkeypatch.delenv(NAME)


@pytest.mark.parametrize(("fsdp2", "expected"), [(False, "1"), (True, None)])
def test_choice(unset, fsdp2, expected):
    environment.choose(fsdp2)
    assert os.environ.get(NAME) == expected


def test_what_the_user_has_set_stays(unset, monkeypatch):
    monkeypatch.setenv(NAME, "8")
    environment.choose(False)
    assert os.environ[NAME] == "8"


def test_still_needed_upstream_refuses_fsdp2_with_one_connection():
    from megatron.training import arguments

    source = inspect.getsource(arguments.validate_args)
    assert f"os.environ.get('{NAME}') != \"1\"" in source


def test_a_process_without_a_launcher_is_rank_0_of_1(monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        # Set first, so that the test's end takes away what is written in between.
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    environment.stand_alone()
    assert [os.environ[name] for name in names[:4]] == ["0", "0", "1", "1"]
    port = os.environ["MASTER_PORT"]
    os.environ["RANK"] = "3"
    environment.stand_alone()
    assert os.environ["RANK"] == "3" and os.environ["MASTER_PORT"] == port
