"""Faults that a rank of `finetune` has, for tests that they are found: see its `inject`."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

# In the environment: the token that a fault befalls, and where to note optimizer steps.
TOKEN = "TEST_FAULT_TOKEN"
STEPS = "TEST_OPTIMIZER_STEPS"


def leaky_attention() -> None:
    """Attention that sees one long document where there are several."""
    from post_training.attention import PackedAttention

    right = PackedAttention.forward

    def leak(self: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Tensor:
        return right(self, *args, packed_seq_params=None, **kwargs)

    PackedAttention.forward = leak  # type: ignore[method-assign,assignment]


def unlike_documents() -> None:
    """A first document that sees the row's last token: a leak backwards in time only."""
    from post_training.attention import PackedAttention

    right = PackedAttention.forward

    def leak(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Tensor:
        return right(self, query, key, value + 1e-3 * value.mean(0, keepdim=True), *args, **kw)

    PackedAttention.forward = leak  # type: ignore[method-assign,assignment]


def blind_model() -> None:
    """A model whose losses do not depend on anything but the label."""
    import finetune

    right = finetune.trained_token_loss

    def blind(vocabulary: int) -> Any:
        process = right(vocabulary)
        return lambda *, hidden_states, **kw: process(hidden_states=hidden_states * 0, **kw)

    finetune.trained_token_loss = blind


class _Poison(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(context: Any, losses: Tensor) -> Tensor:
        return losses.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("nan")


def _befall(what: Any) -> None:
    """Change the losses of the label that the environment names while training."""
    import finetune

    right = finetune.trained_token_loss
    token = int(os.environ[TOKEN])

    def faulty(vocabulary: int) -> Any:
        process = right(vocabulary)

        def befallen(*, labels: Tensor, context: Any, **kwargs: Any) -> Tensor:
            losses = process(labels=labels, context=context, **kwargs)
            hit = labels.flatten().index_select(0, context.indices) == token
            if not torch.is_grad_enabled() or not bool(hit.any()):
                return losses
            changed: Tensor = what(losses, hit)
            return changed

        return befallen

    finetune.trained_token_loss = faulty
    _note_steps()


def _note_steps() -> None:
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from megatron.training import get_args

    right = ChainedOptimizer.step_with_ready_grads

    def noted(self: Any) -> Any:
        with open(os.environ[STEPS], "a") as file:
            file.write(f"{get_args().curr_iteration + 1}\n")
        return right(self)

    ChainedOptimizer.step_with_ready_grads = noted


def nan_loss() -> None:
    """The named label's loss is not a number."""
    _befall(lambda losses, hit: torch.where(hit, losses * float("nan"), losses))


def infinite_loss() -> None:
    """The named label's loss is infinite, and its gradient finite."""
    _befall(lambda losses, hit: losses + torch.where(hit, float("inf"), 0.0))


def nan_gradient() -> None:
    """The named label's loss is right, and its gradient not a number."""
    _befall(lambda losses, hit: torch.where(hit, _Poison.apply(losses), losses))


def no_optimizer() -> None:
    """An optimizer that cannot be built, for a run that needs none."""
    from megatron.training import training

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an optimizer is built")

    training.get_megatron_optimizer = refuse
