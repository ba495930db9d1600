import importlib
import subprocess
import sys

import pytest

from post_training.machine import device
from post_training.platform import kernel_packages
from tests.helpers.launch import LIMIT

NAMES = (*kernel_packages.TRANSFORMER_ENGINE, *kernel_packages.APEX)
# What Megatron imports of Apex where it clips gradients.
KERNELS = "multi_tensor_applier = multi_tensor_l2norm = multi_tensor_scale = 'of a GPU'\n"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that installs Transformer Engine, whose `pytorch` package is the source given."""
    for name in [each for each in sys.modules if each.partition(".")[0] in NAMES]:
        monkeypatch.delitem(sys.modules, name)
    for name in NAMES:
        # Set first, so that the test's end takes away what is written in between.
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(pytorch="", *, top=""):
        folder = tmp_path / "transformer_engine" / "pytorch"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text(top)
        (folder.parent / "common.py").write_text("")
        (folder / "__init__.py").write_text(pytorch)
        (tmp_path / "amp_C.py").write_text("")
        return tmp_path

    return install


def test_on_cpu_no_package_of_kernels_imports(installed, monkeypatch):
    installed("raise SystemExit('a CPU must not even try')")
    monkeypatch.setattr(device, "device_type", lambda: "cpu")
    kernel_packages.apply()
    for name in (*NAMES, "transformer_engine.pytorch"):
        with pytest.raises(ImportError):
            importlib.import_module(name)


def test_on_cpu_what_is_loaded_already_stays(installed, monkeypatch):
    installed()
    import amp_C

    monkeypatch.setattr(device, "device_type", lambda: "cpu")
    kernel_packages.apply()
    assert sys.modules["amp_C"] is amp_C


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"top": "import transformer_engine.common\nraise RuntimeError('no core\\n!')"}, "no core"),
        ({"pytorch": "raise OSError('libcudnn.so: no such file')"}, "OSError: libcudnn.so"),
        ({"pytorch": "import no_such_extension"}, "no_such_extension"),
    ],
)
def test_on_cuda_a_broken_install_is_told_in_a_line_and_passed_over(
    installed, monkeypatch, capsys, source, reason
):
    installed(**source)
    monkeypatch.setattr(device, "device_type", lambda: "cuda")
    monkeypatch.setenv("LOCAL_RANK", "0")
    kernel_packages.apply()
    told = capsys.readouterr().err
    assert told.startswith("warning: Transformer Engine") and told.count("\n") == 1
    assert reason in told
    for name in ("transformer_engine", "transformer_engine.common"):
        with pytest.raises(ImportError):
            importlib.import_module(name)
    importlib.import_module("amp_C")


def test_on_cuda_a_whole_install_stays(installed, monkeypatch, capsys):
    installed()
    monkeypatch.setattr(device, "device_type", lambda: "cuda")
    kernel_packages.apply()
    assert importlib.import_module("transformer_engine.pytorch") and not capsys.readouterr().err


def test_on_cuda_without_an_install_nothing_is_said(installed, monkeypatch, capsys):
    monkeypatch.setattr(device, "device_type", lambda: "cuda")
    kernel_packages.apply()
    assert not capsys.readouterr().err and "transformer_engine" not in sys.modules


@pytest.mark.slow
def test_still_needed_upstream_clips_with_whatever_imports(tmp_path):
    (tmp_path / "apex").mkdir()
    for name in ("amp_C.py", "apex/__init__.py", "apex/multi_tensor_apply.py"):
        (tmp_path / name).write_text(KERNELS)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "if len(sys.argv) > 2:\n"
        "    from post_training import platform; platform.apply()\n"
        "from megatron.core.optimizer import clip_grads\n"
        "print(clip_grads.l2_norm_impl)"
    )
    taken = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), *ours],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=True,
        ).stdout
        for ours in ([], ["ours"])
    ]
    assert "of a GPU" in taken[0] and "of a GPU" not in taken[1], taken
