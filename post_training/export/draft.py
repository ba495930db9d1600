"""From a run that trained a draft to the folder that servers load, read back and compared."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from post_training.batch.packed_documents import PackedDocuments
from post_training.distillation.draft_forward import base_states
from post_training.distillation.draft_model import draft_tokens_of
from post_training.distillation.served_draft import WEIGHTS, ServedDraft
from post_training.distillation.speculation import Verifier
from post_training.errors import SetupError
from post_training.export.hf import CHECK_TEXT, TOLERANCE
from post_training.files import let_all_read
from post_training.hf.draft import DraftShape, draft_config
from post_training.hf.weights import split_parameter
from post_training.inference.load import ModelConfig, frozen_model


def export_draft(
    model: Any,
    args: argparse.Namespace,
    tokenizer: Any,
    folder: str | Path,
    *,
    base: Path,
    model_config: ModelConfig,
    dtype: torch.dtype | None = None,
) -> float:
    """Write the draft of a model, run it behind its base as a server does, and compare.

    Args:
        model: the whole unwrapped model in evaluation mode, with its draft.
        args: its arguments, validated.
        tokenizer: the HuggingFace tokenizer.
        folder: where to write; what is there is replaced (`check_export`).
        base: the HuggingFace folder of the base, with weights.
        model_config: `model_provider.model_config`, which lies above this room.
        dtype: of the weights; the model's own where it is None.

    Returns:
        Largest difference between a logit of the folder's draft and of the trained one, relative to the
        largest logit, over all steps.

    Raises:
        SetupError: the two do not agree.
    """
    config: Any = args.hf_config
    target = Path(folder)
    module, layers = model.eagle_module, model.draft.settings.aux_layers
    offsets = getattr(module, "d2t", None)
    shape = DraftShape.of(config, None if offsets is None else len(offsets))
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in shape.weights().items():
        tensors |= split_parameter(weight, module.get_parameter(name).detach().cpu())
    tensors = {name: value.to(dtype or value.dtype) for name, value in tensors.items()}
    kind = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    if offsets is not None:
        offsets = offsets.cpu()
        known = torch.zeros(config.vocab_size, dtype=torch.bool)
        known[draft_tokens_of(module).cpu()] = True
        tensors |= {"d2t": offsets, "t2d": known}
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    settings = draft_config(config, shape, layers, kind)
    (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
    let_all_read(partial)
    if dtype is not None:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
    ids = torch.tensor(tokenizer(CHECK_TEXT, add_special_tokens=False)["input_ids"][:64])
    # And some to go on with.
    ids = ids[torch.arange(len(ids) + model.draft.settings.steps) % len(ids)]
    expected = _as_trained(model, args, base, model_config, ids)
    difference = _difference(partial, base, args.params_dtype, ids, expected)
    if not difference <= TOLERANCE:
        raise SetupError(
            f"behind {base} the folder's draft differs from the trained one by {difference:.2e} of the "
            f"largest logit (allowed {TOLERANCE:.0e}); the export is left in {partial}"
        )
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return difference


@torch.no_grad()
def _as_trained(
    model: Any, args: argparse.Namespace, base: Path, model_config: ModelConfig, ids: torch.Tensor
) -> torch.Tensor:
    """Logits of every step behind all but the last tokens, at the base's tokens: [steps, vocabulary]."""
    whole, draft = model, model.draft
    if not len(model.decoder.layers):  # trained from stored features
        given = {**vars(args), "hf_model": str(base), "draft": None, "export_offline_model": False}
        _, whole = frozen_model(model_config(argparse.Namespace(**given), None))
    packed = PackedDocuments.from_lengths([len(ids) - draft.settings.steps], qkv_format="sbhd")
    assert packed.position_ids is not None
    row = ids[None, : len(packed.position_ids)]
    inputs = row, packed.position_ids[None], None
    layers = draft.settings.aux_layers
    states = base_states(whole.float(), layers, *inputs, packed_seq_params=packed)
    found = draft.logits(model.float(), ids, packed, states.aux_hidden_states)
    own = draft_tokens_of(model.eagle_module, args.vocab_size)
    logits = torch.zeros(draft.settings.steps, args.vocab_size)
    logits[:, own] = torch.stack(found)[:, : len(own)]
    return logits


@torch.no_grad()
def _difference(
    folder: Path, base: Path, dtype: torch.dtype, ids: torch.Tensor, expected: torch.Tensor
) -> float:
    """Compare with the logits of a server: the base of transformers, whose states config.json counts."""
    from transformers import AutoModelForCausalLM

    # In the run's precision, which rounds the base's weights, and then computed in fp32.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).float().eval()
    served = ServedDraft(folder, model.get_input_embeddings().weight.detach())
    count = len(ids) - len(expected)
    _, states = Verifier(model, served.input_layers).read(ids[:count])
    hidden, logits = served.extend(ids[1 : count + 1], served.features(states), 0)
    found = torch.zeros_like(expected)
    found[0, served.tokens] = logits[-1]
    for step in range(1, len(expected)):
        token = ids[count + step].view(1)
        hidden, logits = served.extend(token, hidden[-1:], count + step - 1)
        found[step, served.tokens] = logits[-1]
    return float((found - expected).abs().max() / expected.abs().max())
