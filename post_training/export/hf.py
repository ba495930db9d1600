"""From the model of a run to a HuggingFace folder that has been read back and compared."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from post_training.errors import SetupError
from post_training.export.quantised import (
    compare_inputs,
    fold_weights,
    reload,
    stored_state,
    without_rounding,
    write_quantisation,
)
from post_training.export.readers import complaints
from post_training.files import json_object, let_all_read
from post_training.hf.causal_lm import auto_class
from post_training.hf.config_json import with_older_spelling, write_model_config
from post_training.hf.folder import (
    MODEL_FILES,
    TOKENIZER_FILES,
    copy_files,
    local_model_folder,
    local_tokenizer_folder,
)
from post_training.hf.weights import hf_state_dict
from post_training.hf_models.model import HFModel
from post_training.hf_models.vision import sample_picture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Largest difference allowed between logits, relative to the largest one. Both sides compute in fp32,
# whatever the dtype of the weights: in bf16 they round in different places, which alone moves logits by
# some percent, and by 15% where a router takes another expert; a wrong rotary base moves them by less.
TOLERANCE = 1e-5
GENERATION = "generation_config.json"
CHECK_TEXT = "The quick brown fox jumps over the lazy dog. 17 + 25 = 42; naïve façade, 東京.\n"
_TEXT: dict[str, torch.Tensor] = {}  # what a model is shown beside text alone
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_hf(
    chunks: list[torch.nn.Module],
    config: PretrainedConfig | None,
    tokenizer: Any,
    folder: str | Path,
    *,
    hf_model: str,
    hf_tokenizer: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
) -> float:
    """Write a model as a HuggingFace folder, reload it and compare its logits.

    Everything is written beside `folder` first and moved there when the comparison has passed. That is made
    in fp32, to which weights of any dtype are turned without loss. What training did not change is copied
    byte for byte; what readers will trip over in it is told on stderr.

    Args:
        chunks: the whole unwrapped model of a run in evaluation mode, as the list's one chunk. It is used
            up: the list is emptied, so that only one model in fp32 lies in memory at a time.
        config: the HuggingFace configuration the model was made from.
        tokenizer: the HuggingFace tokenizer.
        folder: where to write; replaced if it is there (`check_export`).
        hf_model: folder or name of which the files that training does not change are copied.
        hf_tokenizer: the same for the files of the tokenizer, where they are another's.
        trust_remote_code: code that lies beside the model may be run.
        dtype: of the weights; the model's own where it is None.
        max_shard_size: largest safetensors file.

    Returns:
        Largest difference between a logit of the reloaded model and the run's, relative to the largest
        logit.

    Raises:
        SetupError: the model was not made from a HuggingFace configuration, `folder` holds something
            else, a weight is too large for `dtype`, or the reloaded model does not agree.
    """
    from huggingface_hub import save_torch_state_dict
    from transformers import GenerationConfig

    if config is None:
        raise SetupError(
            "the run was made from Megatron flags: there is no HuggingFace configuration"
        )
    target = Path(folder).absolute()  # of "." the name is needed
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    if dtype is not None:
        _cast(chunks[0], dtype)
    in_8_bits = fold_weights(chunks[0])
    source = local_model_folder(hf_model)
    copy_files(source, partial, MODEL_FILES)
    copy_files(local_tokenizer_folder(hf_tokenizer or hf_model), partial, TOKENIZER_FILES)
    config.dtype = next(chunks[0].parameters()).dtype
    if isinstance(chunks[0], HFModel):
        config.vocab_size = config.get_text_config().vocab_size
        _save_hf_model(chunks[0], partial, source, max_shard_size)
    else:
        write_model_config(config, partial, source)
        if in_8_bits:
            state, quantisation = stored_state(chunks[0], config)
            write_quantisation(partial, quantisation)
        else:
            state = {name: value.cpu() for name, value in hf_state_dict(chunks[0], config).items()}
        save_torch_state_dict(
            state, str(partial), max_shard_size=max_shard_size, metadata={"format": "pt"}
        )
        del state
    if not (partial / GENERATION).is_file():
        GenerationConfig.from_model_config(config).save_pretrained(partial)
    let_all_read(partial)

    tokens, seen = check_input(chunks[0], config, tokenizer)
    expected = rounded = logits_of(chunks[0].float(), tokens, config.vocab_size, seen)
    if in_8_bits:
        expected, inputs = without_rounding(
            chunks[0], config, lambda: logits_of(chunks[0], tokens, config.vocab_size)
        )
    chunks.clear()
    reloaded = (
        reload(partial, config)
        if in_8_bits
        else auto_class(config)
        .from_pretrained(partial, dtype=torch.float32, trust_remote_code=trust_remote_code)
        .eval()
    )
    difference = largest_difference(reloaded, tokens, expected, seen)
    if in_8_bits:
        difference = max(difference, compare_inputs(reloaded, inputs))
        # An input that a last bit rounds the other way moves those behind it, up to what rounding does.
        moved = float((rounded - expected).abs().max() / rounded.abs().max())
        difference = max(difference, largest_difference(reloaded, tokens, rounded) - 2 * moved)
    if not difference <= TOLERANCE:
        raise SetupError(
            f"the reloaded model's logits differ from the run's by {difference:.2e} of the largest one "
            f"(allowed {TOLERANCE:.0e}); the export is left in {partial}"
        )
    for complaint in complaints(partial):
        print(f"warning: {target}: {complaint}", file=sys.stderr)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return difference


def _save_hf_model(model: HFModel, folder: Path, source: Path, max_shard_size: str) -> None:
    """Write the weights under the names that the files of the base have, and its config.json.

    `save_pretrained` writes all that it knows of a configuration in the spelling of transformers 5; what
    the base says is enough, and what reads the base reads the export.
    """
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    model.model.save_pretrained(folder, max_shard_size=max_shard_size)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    written = with_older_spelling(model.model.config, json_object(source / "config.json"))
    dtype = str(model.model.dtype).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        if key in written or key == "torch_dtype":
            written[key] = dtype
    text = json.dumps(written, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def check_input(
    model: Any, config: Any, tokenizer: Any
) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Tokens by which two models are compared, and the picture among them where they see."""
    tokens = tokenizer(CHECK_TEXT, add_special_tokens=False)["input_ids"][:128]
    seen = sample_picture(config) if isinstance(model, HFModel) else {}
    if seen:
        tokens.insert(len(tokens) // 2, config.image_token_id)
    return tokens, seen


def shard_size(given: str) -> str:
    """A size of files as huggingface_hub reads it, such as 5GB.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if re.fullmatch(r"[1-9]\d{0,5}(KB|MB|GB|TB)", given.upper()) is None:
        raise argparse.ArgumentTypeError(f"expects a size such as 5GB or 500MB, found {given!r}")
    return given.upper()


@torch.no_grad()
def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Turn all weights to a dtype, in place.

    Raises:
        SetupError: one is too large for it.
    """
    for name, parameter in model.named_parameters():
        turned = parameter.to(dtype)
        if not torch.equal(turned.isfinite(), parameter.isfinite()):
            raise SetupError(
                f"--dtype: {name} holds {parameter.abs().max().item():.3g}, more than {dtype} can; use bf16"
            )
        parameter.data = turned


@torch.inference_mode()
def logits_of(
    model: Any, tokens: list[int], vocabulary: int, seen: dict[str, torch.Tensor] = _TEXT
) -> torch.Tensor:
    """Logits of one sequence by the run's model, on the host: float32 [tokens, vocabulary]."""
    device = next(model.parameters()).device
    row = torch.tensor([tokens], device=device)
    # A picture of one token stands at one place in all three axes: positions are those of text.
    pictures = {"pictures": {name: part.to(device) for name, part in seen.items()}} if seen else {}
    out = model(row, torch.arange(len(tokens), device=device).unsqueeze(0), None, **pictures)
    return out[0, :, :vocabulary].float().cpu()


@torch.inference_mode()
def largest_difference(
    model: Any, tokens: list[int], expected: torch.Tensor, seen: dict[str, torch.Tensor] = _TEXT
) -> float:
    """Largest difference of logits to `expected` [tokens, vocabulary], relative to the largest one."""
    row = torch.tensor([tokens], device=next(model.parameters()).device)
    if seen:
        seen = {**seen, "mm_token_type_ids": (row == model.config.image_token_id).int()}
    found = model(row, use_cache=False, **seen).logits[0].cpu()
    return float((found - expected).abs().max() / expected.abs().max())
