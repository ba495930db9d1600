"""config.json as both generations of readers take it: transformers 5, and 4.x with what is built on it.

transformers 5 keeps rotary parameters in one dictionary, which a reader of 4.57 passes over: it takes
`rope_theta` 10000 and no scaling, without a word. So every value stands under both spellings.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.errors import SetupError
from post_training.files import json_object
from post_training.hf.rotary import rope_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Their frequencies do not depend on the limit.
_FREE_OF_LIMIT = ("default", "linear", "llama3")


def with_limit(config: PretrainedConfig, seq_length: int) -> PretrainedConfig:
    """The configuration of a model that was trained on documents of up to `seq_length` tokens."""
    changed = copy.deepcopy(config)
    limited = hasattr(config, "max_position_embeddings")
    if limited and rope_parameters(config).get("rope_type", "default") in _FREE_OF_LIMIT:
        changed.max_position_embeddings = max(config.max_position_embeddings, seq_length)
    return changed


def older_spelling(config: PretrainedConfig, written: dict[str, Any]) -> dict[str, Any]:
    """What a reader of transformers 4.x looks for, where it is not what transformers 5 writes.

    Args:
        config: the configuration.
        written: what transformers 5 writes of it.
    """
    rope = rope_parameters(config)
    local: dict[str, Any] = {}
    if "full_attention" in rope:  # Gemma 3: layers with a window have a base of their own
        local, rope = rope.get("sliding_attention", {}), dict(rope["full_attention"])
    found: dict[str, Any] = {"torch_dtype": written.get("dtype")}
    found |= {
        alias: written[name] for alias, name in config.attribute_map.items() if name in written
    }
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            found[key] = rope.pop(key)
    if "rope_theta" in local:
        found["rope_local_base_freq"] = local["rope_theta"]
    scaled = rope.get("rope_type", "default") != "default" or "mrope_section" in rope
    found["rope_scaling"] = rope if scaled else None
    return found


def with_older_spelling(config: PretrainedConfig, written: Mapping[str, Any]) -> dict[str, Any]:
    """A base's config.json, which transformers 5 may have written, also as readers of 4.x look for it.

    Args:
        config: of the model, which may see.
        written: what the file says, which stays.
    """
    both: dict[str, Any] = {key: _plain_numbers(value) for key, value in written.items()}
    for part, own in ((both, config), (both.get("text_config"), config.get_text_config())):
        # Without these keys they take other rotary embeddings, and weights that are not tied.
        if isinstance(part, dict) and isinstance(part.get("rope_parameters"), dict):
            tied = {"tie_word_embeddings": config.tie_word_embeddings}
            part |= {**older_spelling(own, part), **tied, **part}
    return both


def _plain_numbers(value: Any) -> Any:
    """Without the objects that stand for infinity in transformers 5."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain_numbers(each) for key, each in value.items()}
    return [_plain_numbers(each) for each in value] if isinstance(value, list) else value


def write_model_config(config: PretrainedConfig, folder: Path, base: Path | None = None) -> None:
    """Write config.json under both spellings, and read it back as an older reader does.

    Args:
        config: the configuration.
        folder: where to.
        base: the folder it was read from, whose further keys are kept.

    Raises:
        SetupError: the older spelling says something else.
    """
    written = _plain_numbers(json.loads(config.to_json_string()))
    written |= older_spelling(config, written)
    if base is not None and (base / "config.json").is_file():
        before = json_object(base / "config.json")
        written = {key: value for key, value in before.items() if key not in written} | written
    check_older_reader(config, written)
    text = json.dumps(written, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def check_older_reader(config: PretrainedConfig, written: dict[str, Any]) -> None:
    """Check that config.json says the same without the keys that only transformers 5 knows.

    Raises:
        SetupError: it does not; with the first key that differs.
    """
    expected = json.loads(config.to_json_string())
    newer = {"rope_parameters", "dtype"}
    # Of a name and its alias one is the older one: each is enough.
    for without in (newer | set(config.attribute_map), newer | set(config.attribute_map.values())):
        # A copy: it writes into the dictionaries that it gets.
        older = copy.deepcopy({k: value for k, value in written.items() if k not in without})
        found = json.loads(type(config).from_dict(older).to_json_string())
        for key, value in expected.items():
            if found.get(key) != value:
                raise SetupError(
                    f"config.json: a reader of transformers 4.x would take {key} {found.get(key)}, the "
                    f"model has {value}; this is a fault of the export"
                )
