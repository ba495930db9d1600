"""scripts/env.sh finds Python, installs once, and survives interruption and concurrent starts.

The Pythons are stand-ins (shell scripts that answer what env.sh asks), so nothing is installed.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Seconds after which something counts as hung, however busy the machine is.
LIMIT = 1200

TOOLS = (
    "bash cat chmod cut dirname find flock grep mkdir mv paste rm sed sha256sum sleep sort tail tr "
    "wc"
).split()

STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$PYTHON_CALLS"
case "$*" in
"-Ic "*) {probe} ;;
"-ISc "*) echo "{version}.0" ;;
"-c "*) echo "2.13.0+cpu" ;;
"-m venv "*) [[ ! -L $3 ]] && mkdir -p "$3/bin" && cat "$0" >"$3/bin/python" && chmod +x "$3/bin/python" ;;
"-m pip --version") ;;
"-m pip install "*)
    echo "$*" >>"$PIP_CALLS"
    echo "Installing collected packages: a, b"
    [[ -z $PIP_GATE ]] || until [[ -e $PIP_GATE ]]; do sleep 0.05; done
    exit "${{PIP_STATUS:-0}}"
    ;;
*) exit 9 ;;
esac
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def write_python(path: Path, version: str, has_venv: str = "yes") -> None:
    old = tuple(map(int, version.split("."))) < (3, 12)
    probe = "exit 1" if old else f'echo "{version} {has_venv} $0"'
    write_program(path, STAND_IN.format(version=version, probe=probe))


class Machine:
    """A copy of the scripts in a fresh folder, with a PATH that holds nothing but plain tools."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.pyenv, self.root = folder / "bin", folder / "pyenv", folder / "a repository"
        self.pip_log = folder / "pip-calls"
        self.python_log = folder.parent / f"{folder.name} python-calls"  # beside what tests compare
        self.bin.mkdir()
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        (self.root / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts" / "env.sh", self.root / "scripts")
        for name in ("setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, self.root)

    def start(self, *arguments: str, code: str = "", **variables: str) -> subprocess.Popen[str]:
        environment = {"PATH": str(self.bin), "HOME": str(self.bin), "PYENV_ROOT": str(self.pyenv)}
        environment |= {"PIP_CALLS": str(self.pip_log), "PYTHON_CALLS": str(self.python_log)}
        environment |= variables
        command = ["bash", "-c", code] if code else ["bash", "scripts/env.sh", *arguments]
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: str = "", **variables: str) -> tuple[int, str, str]:
        process = self.start(*arguments, code=code, **variables)
        out, err = process.communicate(timeout=LIMIT)
        return process.returncode, out, err

    def pip_calls(self) -> list[str]:
        return self.pip_log.read_text().splitlines() if self.pip_log.exists() else []

    def wait_for_pip(self) -> None:
        deadline = time.monotonic() + LIMIT
        while not self.pip_calls():
            assert time.monotonic() < deadline, "pip was not called"
            time.sleep(0.05)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def ready(machine):
    """A machine whose environment has been set up once."""
    write_python(machine.bin / "python3.12", "3.12")
    assert machine.run()[0] == 0
    assert len(machine.pip_calls()) == 1
    return machine


def test_pyenv_version_is_found_behind_a_broken_shim_and_an_old_python3(machine):
    write_program(machine.bin / "python3.12", "#!/bin/sh\necho 'not set up' >&2\nexit 127\n")
    write_python(machine.bin / "python3", "3.11")
    write_python(machine.pyenv / "versions/3.11.7/bin/python3", "3.11")
    write_python(machine.pyenv / "versions/3.12.1/bin/python3", "3.12")
    status, out, err = machine.run("--find-python")
    assert (status, err) == (0, "")
    assert out.strip() == str(machine.pyenv / "versions/3.12.1/bin/python3")


def test_312_is_preferred_to_newer_and_the_oldest_newer_one_is_taken(machine):
    write_python(machine.bin / "python3", "3.14")
    write_python(machine.pyenv / "versions/3.13.2/bin/python3", "3.13")
    assert machine.run("--find-python")[1].strip().endswith("3.13.2/bin/python3")
    write_python(machine.pyenv / "versions/3.12.9/bin/python3", "3.12")
    assert machine.run("--find-python")[1].strip().endswith("3.12.9/bin/python3")


def test_uv_is_asked_and_installs_python_as_a_last_resort(machine, tmp_path):
    managed = tmp_path / "managed" / "python3.12"
    write_program(
        machine.bin / "uv",
        f"""#!/usr/bin/env bash
        case "$*" in
        "python find "*) [[ -e {managed} ]] && echo {managed} ;;
        "python install "*) [[ -n ${{UV_FAILS:-}} ]] || mv {managed}.later {managed} ;;
        esac
        """,
    )
    write_python(Path(f"{managed}.later"), "3.12")
    status, _, err = machine.run("--find-python", UV_FAILS="1")
    assert status == 1 and "uv python install 3.12" in err
    status, out, err = machine.run("--find-python")
    assert status == 0 and "uv installs one" in err and out.strip() == str(managed)


def test_message_says_what_to_install_when_there_is_no_python(machine):
    write_python(machine.bin / "python3", "3.11")
    status, out, err = machine.run(code="source scripts/env.sh dev; echo status $?")
    assert status == 0 and out == "status 1\n"
    assert err.count("error:") == 1
    assert "Python 3.12 or newer" in err and "pyenv install 3.12" in err and "apt-get" in err
    assert not (machine.root / ".venv").exists()


def test_message_names_the_missing_venv_module(machine):
    write_python(machine.bin / "python3", "3.12", has_venv="no")
    status, _, err = machine.run()
    assert status == 1 and err.count("error:") == 1 and "python3-venv" in err


def test_named_python_is_used_or_refused(machine):
    write_python(machine.pyenv / "own", "3.13")
    status, out, _ = machine.run("--find-python", SFT_PYTHON=str(machine.pyenv / "own"))
    assert status == 0 and out.strip() == str(machine.pyenv / "own")
    status, _, err = machine.run("--find-python", SFT_PYTHON="/no/such/python")
    assert status == 1 and "SFT_PYTHON=/no/such/python" in err


def test_of_a_virtual_environment_the_python_beneath_is_taken(machine):
    if sys.prefix == sys.base_prefix:
        pytest.skip("the tests do not run in a virtual environment")
    status, out, _ = machine.run("--find-python", SFT_PYTHON=f"{sys.prefix}/bin/python")
    assert status == 0 and not Path(out.strip()).is_relative_to(sys.prefix)


def test_sourcing_sets_up_once_and_puts_the_environment_first(machine):
    write_python(machine.bin / "python3.12", "3.12")
    code = "set -euo pipefail; source scripts/env.sh dev; type -P python; compgen -A function || :"
    for _ in range(2):
        status, out, _ = machine.run(code=code)
        assert status == 0 and out.split("\n")[0] == str(machine.root / ".venv/bin/python")
        assert "sft" not in out.partition("\n")[2]
    assert len(machine.pip_calls()) == 1 and machine.pip_calls()[0].endswith("-e .[dev]")


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("quickstart.sh", ["out"]),
        ("distill_quickstart.sh", ["out"]),
        ("gpu_check.sh", ["--device", "cpu"]),
    ],
)
def test_options_of_a_script_are_no_extras(machine, script, options):
    write_python(machine.bin / "python3.12", "3.12")
    shutil.copy(ROOT / "scripts" / script, machine.root / "scripts")
    # The Python of the stand-in runs no program of ours: the script ends behind the set-up.
    status, _, err = machine.run(code=f"bash scripts/{script} {' '.join(options)}")
    assert status == 9, err
    calls = " ".join(machine.pip_calls())
    assert "install" in calls and f"[{options[0]}" not in calls, calls


def test_second_run_is_fast(ready):
    """It only asks one Python for its version."""
    before = ready.python_log.read_text()
    assert ready.run() == (0, "", "")
    (started,) = ready.python_log.read_text().removeprefix(before).splitlines()
    assert started.startswith("-ISc import sys")
    assert len(ready.pip_calls()) == 1


@pytest.mark.parametrize("name", ["setup.py", "constraints.txt"])
def test_change_of_the_requirements_updates(ready, name):
    with (ready.root / name).open("a") as file:
        file.write("# changed\n")
    status, _, err = ready.run()
    assert status == 0 and "up to date" in err
    assert len(ready.pip_calls()) == 2


def test_extras_add_up(ready):
    for extras in (["dev"], ["wandb"], [], ["dev"]):
        assert ready.run(*extras)[0] == 0
    calls = [call.rpartition(" ")[2] for call in ready.pip_calls()]
    assert calls == [".", ".[dev]", ".[dev,wandb]"]
    assert ready.run(SFT_EXTRAS="bench,te")[0] == 0
    assert ready.pip_calls()[-1].endswith(".[bench,dev,te,wandb]")


def test_another_python_or_place_rebuilds(ready):
    write_python(ready.root / ".venv/bin/python", "3.11")
    assert "no working Python" in ready.run()[2]
    moved = ready.root.with_name("moved")
    ready.root = ready.root.rename(moved)
    assert "has moved" in ready.run()[2]
    assert len(ready.pip_calls()) == 3
    assert ready.run()[2] == ""


def content(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("owner", ["other clone", "nobody", "folder that is not there"])
def test_a_link_to_what_is_not_ours_is_refused_and_left_alone(ready, tmp_path, owner):
    """Such as to the environment of another clone: it used to be emptied."""
    theirs = tmp_path / "theirs"
    link = ready.root / ".venv"
    if owner != "folder that is not there":
        shutil.copytree(link, theirs)
        (theirs / "precious").write_text("x")
    if owner == "other clone":
        (theirs / ".sft-root").write_text("/somewhere/else")
        (theirs / ".sft-stamp").write_text("of another place\n\n")
    elif owner == "nobody":
        (theirs / ".sft-root").unlink()
        (theirs / ".sft-stamp").unlink()
    shutil.rmtree(link)
    link.symlink_to(theirs)
    before = content(tmp_path)
    for _ in range(2):
        status, _, err = ready.run()
        told = {
            "other clone": f"is a link to {theirs}, the environment of /somewhere/else: remove",
            "nobody": f"is a link to {theirs}, which is not empty and was not made here: remove",
            "folder that is not there": "is a link to a folder that is not there: make the folder, or",
        }
        assert status == 1 and err.count("\n") == 1 and told[owner] in err
    assert content(tmp_path) == before and len(ready.pip_calls()) == 1


def test_a_link_to_an_empty_folder_is_filled_and_reused(machine, tmp_path):
    write_python(machine.bin / "python3.12", "3.12")
    disk, link = tmp_path / "another disk", machine.root / ".venv"
    disk.mkdir()
    link.symlink_to(disk)
    status, _, err = machine.run()
    assert status == 0 and "anew" not in err and "making .venv" in err
    assert link.is_symlink() and (disk / "bin/python").is_file() and (disk / ".sft-stamp").is_file()
    assert machine.run() == (0, "", "")
    assert machine.run("dev")[0] == 0, "an extra goes into it"
    assert len(machine.pip_calls()) == 2
    # What has to be built anew is not deleted through the link, though it is ours.
    (disk / "precious").write_text("x")
    before = content(disk)
    status, _, err = machine.run(TORCH_INDEX_URL="https://index.invalid/cpu")
    assert status == 1 and err.count("\n") == 1
    assert f"anew (TORCH_INDEX_URL has changed), but it is a link: empty {disk}" in err
    assert content(disk) == before


def test_an_interrupted_set_up_behind_a_link_is_known_as_ours(machine, tmp_path):
    write_python(machine.bin / "python3.12", "3.12")
    disk = tmp_path / "disk"
    disk.mkdir()
    (machine.root / ".venv").symlink_to(disk)
    assert machine.run(PIP_STATUS="1")[0] == 1
    status, _, err = machine.run()
    assert (
        status == 1
        and f"anew (its last set-up was interrupted), but it is a link: empty {disk}" in err
    )
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert machine.run()[0] == 0


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_installation_is_built_anew(machine, kind):
    write_python(machine.bin / "python3.12", "3.12")
    process = machine.start(PIP_GATE="never")
    machine.wait_for_pip()
    os.killpg(process.pid, kind)
    process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert not (machine.root / ".venv/.sft-stamp").exists()
    status, _, err = machine.run()
    assert status == 0 and "interrupted" in err
    assert machine.run()[2] == ""


def test_failing_pip_is_reported_and_the_next_start_repairs(machine):
    write_python(machine.bin / "python3.12", "3.12")
    status, _, err = machine.run(PIP_STATUS="1")
    assert status == 1 and "install.log" in err
    status, _, err = machine.run()
    assert status == 0 and "anew" in err


def test_concurrent_starts_install_once(machine):
    if not shutil.which("flock"):
        pytest.skip("no flock: nothing to lock with")
    write_python(machine.bin / "python3.12", "3.12")
    gate = machine.bin / "gate"
    first = machine.start(PIP_GATE=str(gate))
    machine.wait_for_pip()
    second = machine.start()
    assert second.stderr is not None and "waiting" in second.stderr.readline()
    gate.touch()
    second.communicate(timeout=LIMIT)
    first.communicate(timeout=LIMIT)
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(machine.pip_calls()) == 1


def test_torch_index_is_used_and_remembered(ready):
    url = "https://index.invalid/cpu"
    status, _, err = ready.run(TORCH_INDEX_URL=url)
    assert status == 0 and "TORCH_INDEX_URL has changed" in err
    torch, rest = ready.pip_calls()[1:]
    pin = next(
        line for line in (ROOT / "constraints.txt").read_text().split() if line[:7] == "torch=="
    )
    assert torch.endswith(f"{pin} --index-url {url}")
    constraints = (ready.root / ".venv/constraints.txt").read_text()
    assert str(ready.root / ".venv/constraints.txt") in rest
    assert "\ntorch==2.13.0+cpu\n" in constraints and "\nnvidia-modelopt==" in constraints
    assert "\nnvidia-cublas" not in constraints and "\ntriton" not in constraints
    assert ready.run()[2] == ""
    assert "has changed" in ready.run(TORCH_INDEX_URL="")[2]
    assert len(ready.pip_calls()) == 4


def test_unknown_option_is_refused(machine):
    status, _, err = machine.run("--help-me")
    assert status == 1 and "--help-me" in err
