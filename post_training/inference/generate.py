"""Text from a Megatron model: greedy or sampled, with a key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from post_training.errors import SetupError
from post_training.inference.load import LoadedModel

_SENTINEL = "zq7answer7qz"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability together."""
    top_k: int = 0
    """Sample from this many tokens at most; 0 for all."""
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SetupError(f"--max-new-tokens {self.max_new_tokens}: must be at least 1")
        if self.temperature < 0:
            raise SetupError(f"--temperature {self.temperature}: must not be negative")
        if self.top_k < 0:
            raise SetupError(f"--top-k {self.top_k}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise SetupError(f"--top-p {self.top_p}: must be above 0 and at most 1")


def stop_tokens(tokenizer: Any, generation_config: Any = None) -> set[int]:
    """Tokens that end an answer: end of sequence, and what the template writes after an answer.

    Raises:
        SetupError: the generation configuration names something else.
    """
    stops = {tokenizer.eos_token_id}
    configured = getattr(generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    if not all(stop is None or isinstance(stop, int) for stop in configured):
        raise SetupError(f"generation_config.json: eos_token_id {configured} are no token ids")
    stops |= set(configured)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        behind = text.rpartition(_SENTINEL)[2]
        ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in tokenizer.all_special_ids:
            stops.add(ids[0])
    return {stop for stop in stops if stop is not None}


def choose_next(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next token of each row.

    Args:
        logits: float32 [rows, vocabulary].
        sampling: how to choose.
        generator: source of randomness on the CPU.

    Returns:
        int64 [rows].
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays while those before it do not reach top_p: the first always stays.
        outside = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        ordered = ordered.masked_fill(outside, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    chosen = torch.multinomial(probabilities.cpu(), 1, generator=generator)
    return chosen.squeeze(-1).to(logits.device)


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stops: set[int],
    *,
    batch_size: int = 32,
) -> list[list[int]]:
    """Continue prompts.

    Prompts of equal length share a batch, so that no padding enters the computation and the result of
    a prompt does not depend on its neighbours.

    Args:
        loaded: the model.
        prompts: token ids.
        sampling: how to choose tokens, and how many.
        stops: tokens that end an answer.
        batch_size: prompts computed at once.

    Returns:
        New token ids of each prompt, without the stop token.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    answers: list[list[int]] = [[] for _ in prompts]
    for length in sorted(by_length):
        indices = by_length[length]
        for begin in range(0, len(indices), batch_size):
            batch = indices[begin : begin + batch_size]
            rows = [list(prompts[index]) for index in batch]
            for index, answer in zip(
                batch, _generate_batch(loaded, rows, sampling, stops, generator), strict=True
            ):
                answers[index] = answer
    return answers


def _generate_batch(
    loaded: LoadedModel,
    rows: list[list[int]],
    sampling: Sampling,
    stops: set[int],
    generator: torch.Generator,
) -> list[list[int]]:
    from megatron.core.inference.contexts import StaticInferenceContext

    device = next(loaded.model.parameters()).device
    length = len(rows[0])
    context = StaticInferenceContext(len(rows), length + sampling.max_new_tokens)
    tokens = torch.tensor(rows, device=device)
    stop_ids = torch.tensor(sorted(stops), device=device)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    answers: list[list[int]] = [[] for _ in rows]
    for _ in range(sampling.max_new_tokens):
        offset = context.sequence_len_offset
        positions = torch.arange(offset, offset + tokens.shape[1], device=device)
        out = loaded.model(tokens, positions.expand(len(rows), -1), None, inference_context=context)
        context.increment_sequence_len_offset(tokens.shape[1])
        chosen = choose_next(out[:, -1, : loaded.vocabulary].float(), sampling, generator)
        finished |= torch.isin(chosen, stop_ids)
        for answer, token, done in zip(answers, chosen.tolist(), finished.tolist(), strict=True):
            if not done:
                answer.append(token)
        if bool(finished.all()):
            break
        tokens = chosen.unsqueeze(1)
    return answers
