"""How many tokens a speculative draft head gets accepted by the model it drafts for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def has_draft_head(model: Any) -> bool:
    """Whether `model` (unwrapped) has a draft, and the layers to judge it."""
    return getattr(model, "draft", None) is not None and len(model.decoder.layers) > 0


@torch.no_grad()
def acceptance_length(model: Any, prompt: Sequence[int], new_tokens: int) -> float:
    """Tokens that one pass of the model yields on average when it continues `prompt` greedily.

    A pass yields the model's own token and those of the following drafts that the model would have
    written itself, up to the first that it would not: 1.0 when every draft is wrong.

    Args:
        model: an unwrapped `GPTModel` with a draft, in one pipeline stage.
        prompt: token ids.
        new_tokens: length of the continuation.
    """
    tokens = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    written: list[int] = []
    drafted: list[list[int]] = []
    for _ in range(new_tokens):
        base, drafts = model.draft.propose(model, tokens)
        written.append(int(base[0, -1]))
        drafted.append(drafts[0].tolist())
        tokens = torch.cat([tokens, base[:, -1:]], dim=1)
    at = passes = 0
    while at < new_tokens:
        passes += 1
        at += 1
        # Drafts made with the token at `at - 1` are guesses for `at`, `at + 1`, ...
        for guess in drafted[at - 1]:
            if at >= new_tokens or guess != written[at]:
                break
            at += 1
    return new_tokens / passes


def report_acceptance(
    chunks: list[Any], prompts: Sequence[Sequence[int]], new_tokens: int
) -> float | None:
    """Mean acceptance length over prompts; every rank takes part, or none does.

    Returns:
        None, with the reason printed once, where the model has no draft or is cut into stages.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    model = unwrap_model(chunks)[-1]
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    # The same on all ranks: the layout decides, and where there is one stage, what is in it.
    if stages > 1 and has_draft_head(model):
        print("draft acceptance is not measured: the model is cut into pipeline stages", flush=True)
    if stages > 1 or not has_draft_head(model) or not prompts:
        return None
    lengths = [acceptance_length(model, prompt, new_tokens) for prompt in prompts]
    return sum(lengths) / len(lengths)
