"""The safetensors files of a HuggingFace folder, read by parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from post_training.errors import SetupError
from post_training.files import json_object


class HFCheckpoint:
    """The safetensors files of a HuggingFace folder, read by rows and columns, not as a whole."""

    def __init__(self, folder: str | Path) -> None:
        """Index the tensors of `folder`, from the headers of its files.

        Raises:
            SetupError: the folder holds no safetensors weights, or not all of its files, whole.
        """
        self.folder = Path(folder)
        self._files: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        try:
            self._index()
        except SetupError:
            self._stack.close()
            raise
        except SafetensorError as error:
            self._stack.close()
            raise SetupError(f"--hf-model {folder}: weight files are damaged ({error})") from error

    def _index(self) -> None:
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        places: Any = {}
        if index.is_file():
            places = json_object(index).get("weight_map")
            if not isinstance(places, dict) or not all(
                isinstance(file, str) for file in places.values()
            ):
                raise SetupError(f"{index}: weight_map is no mapping of tensors to files")
        files = set(places.values())
        if not files and single.is_file():
            files = {single.name}
        if not files:
            found = ", ".join(sorted(p.name for p in self.folder.glob("*.bin"))) or "no weights"
            raise SetupError(
                f"--hf-model {self.folder}: needs model.safetensors or "
                f"model.safetensors.index.json, found {found}"
            )
        missing = [file for file in files if not (self.folder / file).is_file()]
        if missing:
            raise SetupError(
                f"--hf-model {self.folder}: missing weight files {', '.join(sorted(missing))}"
            )
        for file in sorted(files):
            for name in self._opened(file).keys():
                if places.get(name, file) == file:
                    self._files[name] = file

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = self._stack.enter_context(
                safe_open(self.folder / file, framework="pt")
            )
        return self._open[file]

    def __enter__(self) -> HFCheckpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._files)

    def slice(self, name: str) -> Any:
        """A lazy view of one tensor: indexing it reads just that part from the file."""
        return self._opened(self._files[name]).get_slice(name)
