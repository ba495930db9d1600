"""Speculative decoding, really run: how many drafted tokens a base model accepts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from post_training.distillation.losses import keep_output
from post_training.distillation.served_draft import ServedDraft
from post_training.errors import SetupError


@dataclass
class Acceptance:
    """Counts of one evaluation, as vLLM counts them."""

    proposed: int
    """Tokens of one draft."""
    drafts: int = 0
    """Passes of the base that verified a draft."""
    accepted: list[int] = field(default_factory=list)
    """Drafts of which the token at each place was accepted; tokens behind the end of an answer too."""
    emitted: int = 0
    """Tokens of answers that these passes really gave."""

    def __post_init__(self) -> None:
        self.accepted = self.accepted or [0] * self.proposed

    @property
    def length(self) -> float:
        """Acceptance length: 1 + accepted tokens over drafts; 1.0 where every draft is wrong."""
        return 1 + sum(self.accepted) / max(1, self.drafts)

    @property
    def rates(self) -> list[float]:
        """Of each place, the share of drafts that were right up to it."""
        return [count / max(1, self.drafts) for count in self.accepted]

    @property
    def emitted_per_pass(self) -> float:
        """Tokens of answers for each pass: without what was drafted behind their end."""
        return self.emitted / max(1, self.drafts)


class Verifier:
    """A base model of transformers that also gives the hidden states which a draft reads."""

    def __init__(self, model: Any, input_layers: Sequence[int]) -> None:
        """Watch the model's layers.

        Args:
            model: a causal language model in evaluation mode.
            input_layers: 0 is the embedding's output, i that of layer i - 1 (before the final norm).

        Raises:
            SetupError: the base has no such layer.
        """
        self.model = model
        self._seen: dict[int, Tensor] = {}
        self._order = sorted(input_layers)
        known = inspect.signature(model.forward).parameters  # the old name warns from 5.24 on
        self._keyword = "cache" if "cache" in known else "past_key_values"
        decoder = model.get_decoder()
        if self._order[-1] > len(decoder.layers):
            raise SetupError(
                f"the draft reads the output of layer {self._order[-1] - 1}, the base has layers 0 to "
                f"{len(decoder.layers) - 1}"
            )
        for number in self._order:
            module = decoder.layers[number - 1] if number else model.get_input_embeddings()
            keep_output(module, self._seen, number)
        self.restart()

    def restart(self) -> None:
        """Begin another sequence."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Go on with a sequence.

        Args:
            tokens: int64 [new].

        Returns:
            The most probable next token of each, int64 [new], and its hidden states, [new, 3 * hidden].
        """
        out = self.model(tokens.unsqueeze(0), use_cache=True, **{self._keyword: self.cache})
        states = [self._seen[number].view(len(tokens), -1) for number in self._order]
        return out.logits[0].argmax(-1), torch.cat(states, dim=-1)

    def forget(self, count: int) -> None:
        """Drop the last `count` tokens."""
        if count:
            self.cache.crop(-count)


def greedy(verifier: Verifier, prompt: Sequence[int], limit: int, stops: set[int]) -> list[int]:
    """The base model's own answer: new tokens, without the one that stops it."""
    verifier.restart()
    answer: list[int] = []
    choice, _ = verifier.read(torch.tensor(prompt))
    while len(answer) < limit and int(choice[-1]) not in stops:
        answer.append(int(choice[-1]))
        choice, _ = verifier.read(choice[-1:])
    return answer


def speculate(
    verifier: Verifier,
    draft: ServedDraft,
    prompt: Sequence[int],
    limit: int,
    stops: set[int],
    found: Acceptance,
) -> list[int]:
    """Answer one prompt with drafted tokens, greedily.

    Args:
        verifier: the base.
        draft: its draft.
        prompt: token ids.
        limit: most new tokens.
        stops: tokens that end an answer.
        found: counts, which this adds to.

    Returns:
        New tokens, without the one that stops.
    """
    verifier.restart()
    draft.restart()
    tokens = torch.tensor(prompt)
    choice, states = verifier.read(tokens)
    answer = [int(choice[-1])]
    # A query reads the token that follows it.
    following = torch.cat([tokens[1:], choice[-1:]])
    while len(answer) < limit and answer[-1] not in stops:
        drafted = draft.draft(following, states, found.proposed)
        choice, states = verifier.read(torch.cat([following[-1:], drafted]))
        right = (choice[:-1] == drafted).long().cumprod(0)
        accepted = int(right.sum())
        found.drafts += 1
        for place in range(accepted):
            found.accepted[place] += 1
        verifier.forget(found.proposed - accepted)
        states = states[: accepted + 1]
        following = choice[: accepted + 1]
        before = len(answer)
        for token in following.tolist():
            if len(answer) < limit and answer[-1] not in stops:
                answer.append(token)
        found.emitted += len(answer) - before
    return [token for token in answer if token not in stops]
