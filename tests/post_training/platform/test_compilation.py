import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from post_training import platform
from post_training.platform import compilation


def test_functions_stay_what_they_are():
    def double(x):
        return 2 * x

    assert torch.compile(double) is double
    assert torch.compile(dynamic=True)(double) is double


@pytest.fixture
def complete(tmp_path, monkeypatch):
    """A machine on which nothing is missing."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compilation, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in ("gcc", "cc-13") else None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    return tmp_path


def test_what_triton_needs_is_looked_for(complete, monkeypatch):
    assert compilation.what_is_missing() is None
    monkeypatch.setenv("CC", "cc-13")
    assert compilation.what_is_missing() is None
    # Triton takes no other compiler then.
    monkeypatch.setenv("CC", "cc-14")
    assert compilation.what_is_missing() == "CC=cc-14"
    monkeypatch.delenv("CC")
    (complete / "Python.h").unlink()
    assert str(complete / "Python.h") in str(compilation.what_is_missing())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C compiler" in str(compilation.what_is_missing())
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    assert "triton" in str(compilation.what_is_missing())


def test_still_needed_triton_builds_modules_of_c():
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        pytest.skip("asks Triton's source")
    folder = Path(spec.origin).parent
    assert "Failed to find C compiler" in (folder / "runtime" / "build.py").read_text()
    # Up to 3.7, and from 3.8 on.
    names = ("compile_module_from_src(", "compile_module_from_file(")
    driver = (folder / "backends/nvidia/driver.py").read_text()
    assert any(name in driver for name in names)


@pytest.mark.parametrize("missing", [None, "a C compiler"])
def test_on_cuda_functions_are_compiled_where_that_works(monkeypatch, capsys, missing):
    calls = []
    monkeypatch.setattr(compilation, "what_is_missing", lambda: missing)
    monkeypatch.setattr(compilation, "apply", lambda: calls.append("apply"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    platform._compile_or_not("cuda")
    told = capsys.readouterr().err
    assert len(calls) == told.count("\n") == (missing is not None)
    assert (missing or "") in told
    platform._compile_or_not("cpu")
    assert len(calls) == 1 + (missing is not None)


def test_still_needed_upstream_compiles_its_fused_functions(upstream):
    assert upstream["jit fuser is torch.compile"] and upstream["compile wraps"]
