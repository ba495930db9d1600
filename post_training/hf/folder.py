"""The small files of a HuggingFace folder: which go along with a model that was trained, as they are."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from post_training.errors import SetupError
from post_training.files import json_object

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
# In the order in which they are looked for.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.txt",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.tiktoken",
    "tokenization_*.py",
    *PROCESSOR_FILES,
)
# The model card is left out: it speaks of another model.
MODEL_FILES = (
    "generation_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "LICENSE*",
    "NOTICE*",
)
TEMPLATE = "chat_template.jinja"
# How digests of weights begin that looked at every tensor.
_BY_TENSOR = "tensors:"


@functools.cache
def local_model_folder(name_or_path: str) -> Path:
    """The folder of a HuggingFace model: itself, or where the hub client keeps a named one.

    Raises:
        SetupError: a named model cannot be had.
    """
    patterns = ["*.safetensors", "*.json", *TOKENIZER_FILES, *MODEL_FILES]
    try:
        return _local(name_or_path, patterns)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SetupError(f"--hf-model {name_or_path}: cannot be downloaded ({reason})") from error


def local_tokenizer_folder(name_or_path: str) -> Path:
    """The folder of a tokenizer, likewise; of a named one nothing else is downloaded.

    Raises:
        OSError, ValueError: a named one cannot be had.
    """
    return _local(name_or_path, ["config.json", *TOKENIZER_FILES])


def _local(name_or_path: str, patterns: list[str]) -> Path:
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name_or_path, allow_patterns=patterns))


def check_export(target: Path, run: Path, name: str = "hf") -> None:
    """Refuse to write over a folder that is not a run's own export: a base lies in such a folder too.

    Args:
        target: where a model is to be exported to.
        run: the output folder of the run.
        name: of its own export there.

    Raises:
        SetupError: there is something else.
    """
    place = target.absolute()
    own = place.parent.resolve() / place.name == run.resolve() / name
    free = not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir()))
    if not free and not (own and not target.is_symlink() and any(target.glob("*config.json"))):
        raise SetupError(
            f"--to {target}: is there already, and is not this run's earlier export in {run / name}; give "
            f"another folder, or remove it"
        )
    probe = place.with_name(f"{place.name}.probe")
    try:
        probe.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"--to {target}: cannot be written ({error.strerror})") from error
    with contextlib.suppress(OSError):  # another rank's
        probe.rmdir()


def weights_digest(folder: Path, pattern: str = "*.safetensors", like: str | None = None) -> str:
    """A digest of samples of the weight files: the same for the same base model, wherever it lies.

    Each tensor of safetensors is looked at: finetuning may have changed those of one name only.

    Args:
        folder: with the files.
        pattern: their names.
        like: a digest that is to be compared: versions before looked at sixteen places of a file.
    """
    by_tensor = like is None or like.startswith(_BY_TENSOR)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.glob(pattern) if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        places = [size * part // 16 for part in range(16)]
        with path.open("rb") as file:
            if by_tensor and path.suffix == ".safetensors":
                places += _middles(file, size)
            for place in sorted(places):
                file.seek(place)
                digest.update(file.read(4096))
    return (_BY_TENSOR if by_tensor else "") + digest.hexdigest()


def _middles(file: BinaryIO, size: int) -> list[int]:
    """Where the middle of each tensor is; none of a damaged file, which is refused where it is loaded."""
    begin = 8 + int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(begin - 8)) if begin <= size else {}
        spans = [tensor["data_offsets"] for name, tensor in header.items() if name[:2] != "__"]
        return [begin + max(first, (first + last) // 2 - 2048) for first, last in spans]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> list[Path]:
    """Copy what a folder has of some files, byte for byte; what only the target has of them is removed.

    Returns:
        The copies.
    """
    patterns = tuple(patterns)
    if source.resolve() == target.resolve():
        return []
    wanted = {
        path.relative_to(source)
        for pattern in patterns
        for path in source.glob(pattern)
        if path.is_file()
    }
    for stale in {path for pattern in patterns for path in target.glob(pattern)}:
        if stale.relative_to(target) not in wanted:
            stale.unlink()
    for name in sorted(wanted):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        # Not the mode: a folder that many read may be read-only.
        shutil.copyfile(source / name, target / name)
    return [target / name for name in sorted(wanted)]


def write_template(folder: Path, template: str) -> None:
    """Make a chat template the folder's own, in every file that a reader may look in."""
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    for file in ("tokenizer_config.json", "chat_template.json"):
        if (folder / file).is_file():
            content = json_object(folder / file)
            content["chat_template"] = template
            text = json.dumps(content, ensure_ascii=False, indent=2)
            (folder / file).write_text(text + "\n", encoding="utf-8")
    for other in (folder / "additional_chat_templates").glob("*.jinja"):
        other.unlink()
