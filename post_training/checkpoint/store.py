"""Checkpoints on disk: which are complete, which is the newest, which may go.

    latest_checkpointed_iteration.txt   "10": replaced at once, when iter_0000010 is complete
    iter_0000010/                       Megatron's files, of any format
    iter_0000010/manifest.json          written last: the size of every file, and what the run was
    iter_0000015/                       a save that has not finished,
    iter_0000015.saving                 as this mark beside it says

A checkpoint with a manifest is complete when every file that the manifest names has the size and the
check sum that it names. The sum is of the whole of files up to 256 MiB and of `.metadata`, and of a
sixty-fourth of larger ones: what is cut off, missing, of another save, or damaged over 64 MiB is found in
all. A smaller hole amid a larger file may not be (Megatron's `--verify-integrity` reads it all and does).

A folder in which no checkpoint has a manifest is plain Megatron's: what its tracker file names counts,
when its files are those of its own table of contents.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.documents.check_sum import check_sum
from post_training.checkpoint.integrity import METADATA, contents_defect
from post_training.errors import SetupError

MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"
UNFINISHED = ".saving"
REMOVED = ".removed"
# In a manifest: the check sum of everything else in it.
_OWN_SUM = "manifest_crc32"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as it was found when it was chosen."""

    path: Path
    """Megatron's folder, `iter_NNNNNNN` or `release`."""
    iteration: int | None
    """None for `release`."""
    manifest: Mapping[str, Any] | None
    """What was written down when it was complete; None for one of plain Megatron."""
    has_modelopt: bool
    """Whether it was made from a model that ModelOpt converted."""

    @classmethod
    def at(cls, path: Path) -> Checkpoint:
        """The checkpoint in `path`; whether it is whole, `defect` says."""
        modelopt = (path / "modelopt_state").is_dir()
        return cls(path, iteration_of(path), read_manifest(path), modelopt)


def checkpoint_path(folder: str | Path, iteration: int) -> Path:
    """Megatron's folder for the checkpoint of `iteration` in `folder`."""
    return Path(folder) / f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int | None:
    """The iteration in a checkpoint folder's name, or None when it is not named like one."""
    prefix, _, number = checkpoint.name.partition("iter_")
    return int(number) if not prefix and number.isascii() and number.isdigit() else None


def mark_of(checkpoint: Path) -> Path:
    """The file beside a checkpoint that says that its save has not finished."""
    return checkpoint.with_name(checkpoint.name + UNFINISHED)


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """What was written down when the checkpoint was complete, or None when there is nothing readable."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return None
    if any(not isinstance(manifest.get(key, {}), dict) for key in ("data", "origin")):
        return None  # of something else
    data = manifest.get("data", {})
    made_of = data.get("made_of", [])
    if not isinstance(data.get("begins_at", 0), int) or not isinstance(made_of, list):
        return None
    if not all(isinstance(part, dict) for part in made_of):
        return None
    sums = manifest.get(
        "crc32", manifest["files"]
    )  # older versions wrote none, and no sum of its own
    if not isinstance(sums, dict) or sums.keys() != manifest["files"].keys():
        return None
    return manifest if manifest.get(_OWN_SUM, _sum_of(manifest)) == _sum_of(manifest) else None


def _sum(path: Path) -> int:
    return check_sum(path, whole=path.name == METADATA)


def _sum_of(manifest: Mapping[str, Any]) -> int:
    others = {key: value for key, value in manifest.items() if key != _OWN_SUM}
    return zlib.crc32(json.dumps(others, sort_keys=True).encode())


def defect(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be loaded, or None when nothing is wrong with it."""
    if not checkpoint.is_dir():
        return "it is not there"
    manifest = read_manifest(checkpoint)
    if manifest is None:
        if (checkpoint / MANIFEST).exists():
            return f"its {MANIFEST} cannot be read"
        if mark_of(checkpoint).exists():
            return "its save did not finish"
        if _with_manifest(checkpoint.parent):
            return f"it has no {MANIFEST}"
        return contents_defect(checkpoint)
    sums = manifest.get("crc32")  # older versions wrote none
    for name, size in manifest["files"].items():
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} of {size} bytes"
            if sums is not None and _sum(checkpoint / name) != sums[name]:
                return f"{name} does not hold what was saved"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return contents_defect(checkpoint) if sums is None else None


def tracked_iteration(folder: str | Path) -> int | str | None:
    """What the tracker file names: an iteration, `release`, or nothing that makes sense."""
    try:
        text = (Path(folder) / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    if text.isascii() and text.isdigit():
        return int(text)
    return text if text == "release" else None


def _with_manifest(folder: str | Path) -> list[tuple[int, Path]]:
    """Checkpoints that have been complete once, and their iterations, newest first."""
    found = (
        (iteration_of(file.parent), file.parent) for file in Path(folder).glob(f"*/{MANIFEST}")
    )
    return sorted(((number, path) for number, path in found if number is not None), reverse=True)


def newest_before(folder: str | Path, iteration: int | None) -> Checkpoint | None:
    """The newest complete checkpoint of this project before `iteration` (None: of all)."""
    for number, path in _with_manifest(folder):
        if (iteration is None or number < iteration) and defect(path) is None:
            return Checkpoint.at(path)
    return None


def find_checkpoint(folder: str | Path) -> tuple[Checkpoint | None, str | None]:
    """The newest complete checkpoint of a folder, and what is wrong with the one the tracker names.

    The tracker decides: whoever writes an older iteration into it goes back to that. Only when it is
    missing or unreadable, or names a damaged checkpoint, the next older complete one is taken.

    Returns:
        The checkpoint, or None when there is none; and a sentence when another was meant.
    """
    folder = Path(folder)
    tracked = tracked_iteration(folder)
    if isinstance(tracked, int):
        for number, path in _with_manifest(folder):
            if number > tracked and mark_of(path).exists() and defect(path) is None:
                return Checkpoint.at(path), None  # killed when only the tracker was to be written
        meant, before = checkpoint_path(folder, tracked), tracked
    elif tracked is None:
        return _without_tracker(folder)
    else:
        meant, before = folder / tracked, sys.maxsize  # "release", of no step
    wrong = defect(meant)
    if wrong is None:
        return Checkpoint.at(meant), None
    return newest_before(folder, before), f"{meant}: {wrong}"


def _without_tracker(folder: Path) -> tuple[Checkpoint | None, str | None]:
    """As `find_checkpoint`, where no tracker file says which checkpoint is meant."""
    complaint = None
    if (folder / TRACKER).exists():
        complaint = f"{folder / TRACKER} cannot be read"
    found = ((iteration_of(path), path) for path in folder.glob("iter_*") if path.is_dir())
    known = sorted(((number, path) for number, path in found if number is not None), reverse=True)
    for _, path in known:
        wrong = defect(path)
        if wrong is None:
            return Checkpoint.at(path), complaint
        if (path / MANIFEST).exists() or not mark_of(path).exists():
            complaint = complaint or f"{path}: {wrong}"
    return None, complaint if known else None


def latest_checkpoint(folder: str | Path) -> Checkpoint | None:
    """The newest complete checkpoint in `folder`, or None when there is none."""
    return find_checkpoint(folder)[0]


def _replace(path: Path, text: str) -> None:
    """Write a small file so that it is, even after a power cut, the old one or the new one as a whole."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def point_at(folder: str | Path, iteration: int) -> None:
    """Let the tracker file name `iteration`."""
    _replace(Path(folder) / TRACKER, str(iteration))


def begin_save(folder: str | Path, iteration: int) -> Path:
    """Make an empty, marked folder for the checkpoint of `iteration`, and return it.

    Raises:
        OSError: it cannot be written.
    """
    checkpoint = checkpoint_path(folder, iteration)
    # One of the same name is damaged, or of a course of training that was left for an older checkpoint.
    _remove_folder(checkpoint)
    mark_of(checkpoint).write_text(str(iteration))
    checkpoint.mkdir()
    return checkpoint


def finish_save(folder: str | Path, iteration: int, facts: Mapping[str, Any]) -> None:
    """Declare a checkpoint complete: manifest, then tracker, then the mark goes.

    Args:
        folder: where the checkpoints are.
        iteration: of the checkpoint whose files are all written.
        facts: what the manifest holds beside `files` and `crc32`.

    Raises:
        OSError: something could not be written; the tracker names the checkpoint before.
    """
    checkpoint = checkpoint_path(folder, iteration)
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    names = [path.relative_to(checkpoint).as_posix() for path in files if path.name != MANIFEST]
    manifest = {
        "iteration": iteration,
        **facts,
        "files": {name: (checkpoint / name).stat().st_size for name in names},
        "crc32": {name: _sum(checkpoint / name) for name in names},
    }
    manifest = json.loads(json.dumps(manifest))  # as it will be read
    manifest[_OWN_SUM] = _sum_of(manifest)
    _replace(checkpoint / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    point_at(folder, iteration)
    mark_of(checkpoint).unlink(missing_ok=True)


def abandon_save(folder: str | Path, iteration: int) -> None:
    """Remove what was written of a checkpoint that will not be complete."""
    checkpoint = checkpoint_path(folder, iteration)
    _remove_folder(checkpoint)
    mark_of(checkpoint).unlink(missing_ok=True)


def clean_up(folder: str | Path) -> list[int]:
    """Remove what saves and removals left behind that were cut off; returns the saves' iterations.

    Only what carries a mark is removed: a folder that somebody else put there stays.
    """
    for rest in Path(folder).glob(f"iter_*{REMOVED}"):
        shutil.rmtree(rest)
    removed = []
    for mark in Path(folder).glob(f"iter_*{UNFINISHED}"):
        checkpoint = mark.with_name(mark.name.removesuffix(UNFINISHED))
        iteration = iteration_of(checkpoint)
        if iteration is None:
            continue
        if read_manifest(checkpoint) is None or defect(checkpoint) is not None:
            _remove_folder(checkpoint)
            removed.append(iteration)
        mark.unlink(missing_ok=True)
    return sorted(removed)


def remove_old(
    folder: str | Path,
    *,
    newest: int,
    keep: int | None,
    retain_interval: int | None,
    best: int | None = None,
) -> list[int]:
    """Remove checkpoints that are no longer wanted, once `newest` is complete; returns their iterations.

    Args:
        folder: where the checkpoints are.
        newest: the checkpoint that the tracker names; it and later ones are never removed.
        keep: `--keep-checkpoints`: how many complete ones stay, the newest among them. A damaged one
            does not count.
        retain_interval: `--save-retain-interval`: multiples of it stay too; given alone, `keep` is 1.
        best: the one of the best evaluation, which stays too.

    Raises:
        OSError: a folder cannot be removed.
    """
    if keep is None and retain_interval is None:
        return []
    kept, removed = 0, []
    for iteration, path in _with_manifest(folder):
        if iteration > newest or path.is_symlink() or (iteration == best and iteration != newest):
            continue
        if kept < (keep or 1):
            kept += defect(path) is None
        elif not (retain_interval and iteration % retain_interval == 0):
            _remove_folder(path)
            removed.append(iteration)
    return sorted(removed)


def _remove_folder(checkpoint: Path) -> None:
    """Remove a checkpoint; renamed first, so that what a kill leaves does not look like one."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
    elif checkpoint.exists():
        removed = checkpoint.with_name(checkpoint.name + REMOVED)
        if removed.exists():
            shutil.rmtree(removed)
        checkpoint.rename(removed)
        shutil.rmtree(removed)


def chosen_checkpoint(
    folder: str | Path, iteration: int | None
) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint of `iteration` (`--ckpt-step`), or the newest complete one where that is None.

    Returns:
        As `find_checkpoint`.

    Raises:
        SetupError: the iteration's checkpoint is not complete, or the folder's only one is damaged.
    """
    if iteration is not None:
        path = checkpoint_path(folder, iteration)
        wrong = defect(path)
        if wrong is not None:
            raise SetupError(
                f"{folder}: holds no complete checkpoint of iteration {iteration}: {wrong}; leave "
                f"--ckpt-step (of the tools: --iteration) out to take the newest one"
            )
        return Checkpoint.at(path), None
    checkpoint, complaint = find_checkpoint(folder)
    if checkpoint is None and complaint is not None:
        raise SetupError(f"{complaint}; {no_older(folder)}")
    return checkpoint, complaint


def no_older(folder: str | Path) -> str:
    """What to do where the only checkpoint of `folder` is damaged."""
    return (
        f"there is no older complete checkpoint in {folder}: restore one from a copy, or start from the "
        f"beginning in another --output-dir"
    )
