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


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_of_memory_grow_unless_the_user_says_otherwise(monkeypatch, name):
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(each, "")
        monkeypatch.delenv(each)
    if name:
        monkeypatch.setenv(name, "backend:native")
    environment.let_memory_grow()
    found = {k: v for k, v in os.environ.items() if k.endswith("ALLOC_CONF")}
    usual = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert found == ({name: "backend:native"} if name else usual)


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
    os.environ |= {"RANK": "3", "WORLD_SIZE": "4"}
    environment.stand_alone()
    assert os.environ["RANK"] == "3" and os.environ["MASTER_PORT"] == port


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc': expects an integer"),
        ({"RANK": ""}, "RANK is '': expects an integer"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK is '1.5': expects an integer"),
        ({"RANK": "-1"}, "RANK is -1: must be at least 0"),
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"LOCAL_RANK": "5"}, "LOCAL_RANK is 5, but LOCAL_WORLD_SIZE is 2"),
        ({"RANK": None, "WORLD_SIZE": None, "LOCAL_RANK": "abc"}, "LOCAL_RANK is 'abc': expects"),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4, but WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0: must be at least 1"),
        ({"WORLD_SIZE": None}, "RANK is set, but WORLD_SIZE is not"),
        ({"RANK": None}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http': expects an integer"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000: must be at most 65535"),
        ({"MASTER_ADDR": None}, "RANK is set, but MASTER_ADDR is not"),
        ({"RANK": None, "SLURM_NTASKS": "x"}, "SLURM_NTASKS is 'x'"),
        (
            {"RANK": None, "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
            "srun started several tasks, but RANK and WORLD_SIZE are not set",
        ),
    ],
)
def test_what_no_launcher_would_set_is_refused(monkeypatch, capsys, changes, told):
    """Megatron and torch would end in `int()` of it, or wait for ranks that do not come."""
    job = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (job | changes).items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    with pytest.raises(SystemExit) as ended:
        environment.stand_alone()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {told}")
