import importlib
from pathlib import Path

import pytest

from post_training import platform
from post_training.platform import compilation

CPU_ONLY = {
    "compilation",
    "cuda_runtime",
    "tensor_devices",
    "cpu_rng",
    "cpu_initialize",
    "cpu_collectives",
}
FOLDER = Path(platform.__file__).parent


@pytest.fixture
def applied(monkeypatch):
    """Names of the modules that `apply()` calls, in order, instead of their effects."""
    calls: list[str] = []
    for file in FOLDER.glob("[!_]*.py"):
        module = importlib.import_module(f"post_training.platform.{file.stem}")
        if hasattr(module, "apply"):
            monkeypatch.setattr(module, "apply", lambda name=file.stem: calls.append(name))
    monkeypatch.setattr(platform, "_applied", False)
    return calls


def test_on_cuda_nothing_but_the_wheel_mends_is_active(applied, monkeypatch):
    monkeypatch.setattr(platform, "device_type", lambda: "cuda")
    monkeypatch.setattr(compilation, "what_is_missing", lambda: None)
    platform.apply()
    assert not CPU_ONLY & set(applied)
    assert {"kernel_packages", "dataset_helpers", "training_hooks"} <= set(applied)


def test_on_cpu_every_file_is_applied_once(applied, monkeypatch):
    monkeypatch.setattr(platform, "device_type", lambda: "cpu")
    platform.apply()
    platform.apply()
    assert set(applied) >= CPU_ONLY
    assert len(applied) == len(set(applied))
    assert set(applied) == {
        f.stem for f in FOLDER.glob("[!_]*.py") if "\ndef apply() ->" in f.read_text()
    }
    # torch's names are replaced before Megatron is imported, which reads them.
    for early in ("tensor_devices", "kernel_packages"):
        assert applied.index(early) < applied.index("megatron_post_training")


def test_every_file_has_its_test():
    tests = {file.stem for file in Path(__file__).parent.glob("test_*.py")}
    assert {f"test_{file.stem}" for file in FOLDER.glob("[!_]*.py")} <= tests


def test_a_process_without_a_launcher_is_rank_0_of_1(monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        # Set first, so that the test's end takes away what is written in between.
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    platform._stand_alone()
    import os

    assert [os.environ[name] for name in names[:4]] == ["0", "0", "1", "1"]
    port = os.environ["MASTER_PORT"]
    os.environ["RANK"] = "3"
    platform._stand_alone()
    assert os.environ["RANK"] == "3" and os.environ["MASTER_PORT"] == port
