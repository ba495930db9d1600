import importlib
from pathlib import Path

import pytest

from post_training import platform
from post_training.platform import compilation

CPU_ONLY = {
    "compilation",
    "cpu.cuda_runtime",
    "cpu.tensor_devices",
    "cpu.rng",
    "cpu.initialize",
    "cpu.collectives",
}
FOLDER = Path(platform.__file__).parent
FILES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): path
    for path in FOLDER.rglob("[!_]*.py")
}


@pytest.fixture
def applied(monkeypatch):
    """Names of the modules that `apply()` calls, in order, instead of their effects."""
    calls: list[str] = []
    for file in FILES:
        module = importlib.import_module(f"post_training.platform.{file}")
        if hasattr(module, "apply"):
            monkeypatch.setattr(module, "apply", lambda name=file: calls.append(name))
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
        name for name, path in FILES.items() if "\ndef apply() ->" in path.read_text()
    }
    # torch's names are replaced before Megatron is imported, which reads them.
    for early in ("cpu.tensor_devices", "kernel_packages"):
        assert applied.index(early) < applied.index("megatron_post_training")


def test_every_file_has_its_test():
    here = Path(__file__).parent
    for path in FILES.values():
        place = path.relative_to(FOLDER)
        assert (here / place.with_name(f"test_{place.name}")).is_file(), place
