"""From a run that trained a draft to the folder that servers load, read back and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from post_training.batch.packed_documents import PackedDocuments
from post_training.distillation.draft_model import draft_tokens_of
from post_training.distillation.served_draft import WEIGHTS, ServedDraft
from post_training.errors import SetupError
from post_training.export.hf import CHECK_TEXT, TOLERANCE
from post_training.files import let_all_read
from post_training.hf.draft import DraftShape, draft_config
from post_training.hf.weights import split_parameter


def export_draft(
    model: Any,
    config: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
) -> float:
    """Write the draft of a model, read it as a server does and compare what both would draft.

    Args:
        model: the whole unwrapped model in evaluation mode, with its draft.
        config: the HuggingFace configuration of its base.
        tokenizer: the HuggingFace tokenizer.
        folder: where to write; what is there is replaced (`check_export`).
        dtype: of the weights; the model's own where it is None.

    Returns:
        Largest difference between a logit of the folder's draft and of the trained one, relative to the
        largest logit, over all steps.

    Raises:
        SetupError: the two do not agree.
    """
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
    difference = _difference(model, partial, config, tokenizer, dtype)
    if not difference <= TOLERANCE:
        raise SetupError(
            f"the folder's draft differs from the trained one by {difference:.2e} of the largest logit "
            f"(allowed {TOLERANCE:.0e}); the export is left in {partial}"
        )
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return difference


@torch.no_grad()
def _difference(
    model: Any, folder: Path, config: Any, tokenizer: Any, dtype: torch.dtype | None
) -> float:
    """Compare the logits of every step at one token, with hidden states of no meaning but of usual size."""
    module, draft = model.eagle_module, model.draft
    if dtype is not None:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
    model.float()
    ids = torch.tensor(tokenizer(CHECK_TEXT, add_special_tokens=False)["input_ids"][:64])
    count, steps = len(ids), draft.settings.steps
    ids = ids[torch.arange(count + steps) % count]  # and some to go on with
    generator = torch.Generator().manual_seed(0)
    aux = torch.randn(count, 1, 3 * config.hidden_size, generator=generator)
    packed = PackedDocuments.from_lengths([count], qkv_format="sbhd")
    trained = draft.logits(model, ids, packed, aux)
    rows = model.embedding.word_embeddings.weight[: config.vocab_size].float()
    served = ServedDraft(folder, rows)
    if served.input_layers != [layer + 1 for layer in draft.settings.aux_layers]:
        return float("inf")
    hidden, logits = served.extend(ids[1 : count + 1], served.features(aux[:, 0]), 0)
    found = [logits[-1]]
    for step in range(1, steps):
        token = ids[count + step].view(1)
        hidden, logits = served.extend(token, hidden[-1:], count + step - 1)
        found.append(logits[-1])
    expected = torch.stack(trained)[:, : served.shape.vocabulary]
    # Both at the base's tokens: the draft's own order says nothing of what a server emits.
    own = draft_tokens_of(module, served.shape.vocabulary)
    rows = torch.zeros(2, steps, served.vocabulary)
    rows[0][:, served.tokens], rows[1][:, own] = torch.stack(found), expected
    return float((rows[0] - rows[1]).abs().max() / expected.abs().max())
