"""The router of a mixture-of-experts layer: which experts the documents' tokens go to, and how evenly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.overrides import TorchFunctionMode

from post_training.batch.packed_documents import RoutedDocuments
from post_training.metrics.step_counters import counters


class DocumentRouter(TopKRouter):
    """Megatron's router, which also counts, and balances experts document by document.

    The tokens of documents that each expert gets are added to `counters`. With `--moe-aux-loss-coeff` c
    the loss of a layer grows by c times

        sum over documents d of t_d * L_d,    L_d = E * sum over experts i of f_i * P_i

    where t_d counts the trained tokens of d, E the experts, f_i is the share of d's assignments that go
    to expert i, and P_i the mean probability of i over d's tokens (Switch Transformer, arXiv 2101.03961,
    equations 4 to 6, for one document). Like the cross-entropy it is divided by all trained tokens of the
    global batch. So documents weigh as in the loss, padding weighs nothing, and neither micro batches nor
    packs nor ranks change the result. Megatron's own losses balance over a micro batch, padding included,
    and are multiplied by all its tokens, trained or not, under `--calculate-per-token-loss`.
    """

    expert_bias: Tensor | None
    documents: RoutedDocuments | None = None
    """Set before each forward pass of the layer (`follow_documents`)."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the bias that experts are chosen by with the model, but never round it."""
        bias: Tensor | None = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None:
            self.expert_bias = bias.to(next(self.parameters()).device)
        return self

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            logits: [local tokens, 1, experts].
            padding_mask: not used.

        Returns:
            Weights of the chosen experts and a boolean map of them, both [local tokens, experts].
        """
        probs, chosen = super().routing(logits, padding_mask)
        documents = self.documents
        # With recomputed activations the pass that has gradients is the second one.
        if documents is None or not (self.training and torch.is_grad_enabled()):
            return probs, chosen
        of_token = self._local(documents.of_token, chosen.shape[0])
        counted = (documents.trained > 0).float().index_select(0, of_token)
        assigned = chosen.float()
        coefficient = self.config.moe_aux_loss_coeff
        balance = None
        if coefficient:
            scores = torch.softmax(logits.view_as(chosen), dim=-1, dtype=torch.float32)
            balance = self._balance(scores, assigned, of_token, documents)
            probs = MoEAuxLossAutoScaler.apply(probs, coefficient * balance)
            balance = balance.detach()
        assert self.layer_number is not None
        counters.add_expert_tokens(self.layer_number, counted @ assigned, balance)
        return probs, chosen

    def apply_input_jitter(self, input: Tensor) -> Tensor:
        """Multiply by `--moe-input-jitter-eps`'s noise, in training only: Megatron's own evaluates with it.

        Args:
            input: hidden states, [local tokens, 1, hidden].
        """
        jittered: Tensor = super().apply_input_jitter(input) if self.training else input
        return jittered

    def _local(self, of_token: Tensor, tokens: int) -> Tensor:
        """With sequence parallelism a rank of the tensor parallel group routes a part of the row."""
        if len(of_token) == tokens:
            return of_token
        return of_token.view(-1, tokens)[self.tp_group.rank()]

    def _balance(
        self, scores: Tensor, assigned: Tensor, of_token: Tensor, documents: RoutedDocuments
    ) -> Tensor:
        """This rank's part of the sum over documents of t_d * L_d: float32 scalar with gradient.

        Args:
            scores: probabilities, float32 [local tokens, experts].
            assigned: 1 where an expert is chosen: float32 [local tokens, experts].
            of_token: document of each local token.
            documents: of the micro batch.
        """
        experts = scores.shape[1]
        totals = assigned.new_zeros(len(documents.lengths), experts)
        totals.index_add_(0, of_token, assigned)
        if self.tp_cp_group.size() > 1:
            # A document's tokens lie on several ranks; each adds up the probabilities of its own.
            torch.distributed.all_reduce(totals, group=self.tp_cp_group)
        weights = experts * documents.trained / (self.topk * documents.lengths.square())
        return (scores * (totals * weights[:, None]).index_select(0, of_token)).sum()


def follow_documents(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Let the routers of unwrapped `GPTModel` chunks know the documents that their layer is given."""

    def remember(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        layer.mlp.router.documents = getattr(kwargs.get("packed_seq_params"), "routed", None)

    for chunk in chunks:
        for module in chunk.modules():
            router = getattr(getattr(module, "mlp", None), "router", None)
            if isinstance(router, DocumentRouter):
                # On the layer, whose arguments are kept where activations are recomputed.
                module.register_forward_pre_hook(remember, with_kwargs=True)
    return chunks


class _SameExperts:
    """Lets every second pass of a router choose the experts that the pass before it chose.

    The interface is that of `megatron.core.transformer.moe.router_replay.RouterReplay`, whose objects
    have to be told each time what to do.
    """

    def __init__(self) -> None:
        self._chosen: Tensor | None = None

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        choose: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the experts of each token, both [local tokens, topk]."""
        if self._chosen is None:
            values, self._chosen = choose(
                scores, topk, num_groups=num_groups, group_topk=group_topk
            )
            return values, self._chosen
        chosen, self._chosen = self._chosen, None
        return scores.gather(1, chosen), chosen


class RepeatedChoices(TorchFunctionMode):
    """Lets every second pass of a model that is not Megatron's take the largest ones that the first took.

    Routers of `transformers` are each a class of their own; all choose by `torch.topk`. Of several such
    contexts the innermost one acts.
    """

    _entered: ClassVar[list[RepeatedChoices]] = []

    def __init__(self) -> None:
        super().__init__()
        self._chosen: list[Tensor] = []
        self._repeated: Iterator[Tensor] | None = None

    def __enter__(self) -> RepeatedChoices:
        self._entered.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._entered.pop()

    def choose(self) -> None:
        """A pass begins that chooses."""
        self._repeated, self._chosen = None, []

    def repeat(self) -> None:
        """The pass begins that repeats the choices of the one before."""
        self._repeated = iter(self._chosen)

    def next_pass(self, *unused: Any) -> None:
        """One of both, in turn."""
        if self._repeated is None and self._chosen:
            self.repeat()
        else:
            self.choose()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Scores are the pass's own."""
        found = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk) or self._entered[-1] is not self:
            return found
        if self._repeated is None:
            self._chosen.append(found.indices)
            return found
        named = dict(zip(("input", "k", "dim"), args, strict=False)) | (kwargs or {})
        scores: Tensor = named["input" if "input" in named else "self"]
        chosen = next(self._repeated)
        values = scores.gather(named.get("dim", -1), chosen)
        return torch.return_types.topk((values, chosen))


@contextmanager
def same_experts(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Make two passes over rows of the same shape comparable bit for bit.

    An expert multiplies all its tokens in one matrix, and how that is rounded depends on its height. Inside
    this context the first pass of each pair routes freely and the second repeats it: every expert gets as
    many tokens, in the same order. Only the choice is repeated; scores and weights are the pass's own.

    Args:
        chunks: of this rank's model, wrapped or not.
    """
    routers = [
        module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)
    ]
    replays = [router.router_replay for router in routers]
    deterministic = torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    if routers:
        # On CUDA the outputs of a token's experts are added up by atomic operations otherwise.
        torch.use_deterministic_algorithms(True, warn_only=True)
    for router in routers:
        router.router_replay = _SameExperts()
    choices = RepeatedChoices()
    # A model of Megatron's layers without experts has nothing to choose; beside it a teacher may.
    foreign = any(getattr(m, "chooses_by_topk", False) for c in chunks for m in c.modules())
    hooks = [c.register_forward_pre_hook(choices.next_pass) for c in chunks[:1] if foreign]
    try:
        with choices if foreign else contextlib.nullcontext():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for router, replay in zip(routers, replays, strict=True):
            router.router_replay = replay
        torch.use_deterministic_algorithms(deterministic, warn_only=only_warn)
