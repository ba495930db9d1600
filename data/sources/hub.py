"""Datasets of the HuggingFace hub and local folders of them, loaded, or one error that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.errors import DataError
from data.sources.chunks import read_chunk
from data.sources.files import resolve_files
from data.sources.readers import file_chunks


def load_dataset(name: str, split: str) -> Any:
    """Load a hub dataset or a local folder.

    Raises:
        DataError: it cannot be loaded, or has no such split.
    """
    import datasets

    try:
        folder = Path(name)
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            loaded = datasets.load_from_disk(name)
            return _saved_split(loaded, name, split)
        return datasets.load_dataset(name, split=split)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0][:300]
        if broken := "" if "Unknown split" in detail else _first_bad_row(folder):
            raise DataError(
                f"--finetune-hf-dataset {name}: cannot be loaded; {broken}. Mend the row, or read the "
                "folder with --finetune-data-files and --on-bad-row skip."
            ) from error
        raise DataError(
            f"--finetune-hf-dataset {name}: cannot be loaded ({detail}). Check the name, the "
            f"network, and --finetune-data-split {split}."
        ) from error


def _first_bad_row(folder: Path) -> str:
    """What is wrong in the files of a folder, with the place: the errors of datasets name none."""
    try:
        paths = resolve_files([str(folder)]) if folder.is_dir() else []
    except DataError:
        return ""  # it holds no file of ours
    try:
        for path in paths:
            if path.name == "dataset_infos.json":
                continue
            for chunk in file_chunks(path, 0):
                for raw in read_chunk(chunk):
                    if raw.error is not None:
                        return f"{raw.place}: {raw.error}"
    except DataError as error:
        return str(error).rstrip(".")
    return ""


def _saved_split(loaded: Any, name: str, split: str) -> Any:
    """The split of a folder that save_to_disk wrote: a DatasetDict, or one Dataset."""
    if isinstance(loaded, dict):
        if split not in loaded:
            raise DataError(
                f"--finetune-data-split {split}: --finetune-hf-dataset {name} has the splits "
                f"{', '.join(loaded)}."
            )
        return loaded[split]
    # A single Dataset is what was asked for under the default name, whatever its own.
    own = None if loaded.split is None else str(loaded.split)
    if split not in ("train", own):
        raise DataError(
            f"--finetune-data-split {split}: --finetune-hf-dataset {name} holds one dataset, "
            + (f"the split {own}." if own else "without a split name; leave the flag out.")
        )
    return loaded
