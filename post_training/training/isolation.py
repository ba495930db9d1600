"""Before the first step: a changed document must not move the losses of the others, on this very run.

Two micro batches go forward through the run's own model, layout and schedule: the same real packs twice,
the second time with some tokens of one document replaced.

    documents   A A A A A A   B B B B B B B B B   C C C C
    replaced                        x x x
    watched     0 0 0 0 0     1 1         2 2 2   0 0 0

    0  other documents: must not move            (isolation)
    1  the same document, earlier: must not move (causality)
    2  the same document, later: must move, or the check would see nothing

The loss mask tells which tokens are watched and the groups as what, through tensor parallel broadcasts
and context parallel cuts like those of training. No gradient is computed and nothing of the run is
touched: not the data position, not the random state, not the counters.

With experts the second pass sends every token to the experts of the first (`router.same_experts`), so that
there too not one bit may move: what a token gets from its experts is computed anew, only which ones it
asks is not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from data import SFTDataset
from data.packs.pictures import PICTURE_FIELDS, PictureDataset
from post_training.batch.packed_documents import row_lengths
from post_training.errors import RunStopped
from post_training.machine.device import current_device
from post_training.model.router import same_experts
from post_training.platform.training_hooks import TrainStart
from post_training.training.trial import ForwardStep, trial_losses, undisturbed

OTHERS, EARLIER, LATER = range(3)
GROUPS = 3
# Micro batches that are looked at for one with two documents.
LOOKED_AT = 64

Micro = dict[str, Tensor]


def reason_not_to_check(args: argparse.Namespace) -> str | None:
    """Why documents of this run may depend on each other rightly, or may not be run twice; else None."""
    if args.moe_expert_capacity_factor is not None:
        return "--moe-expert-capacity-factor drops tokens, by which documents depend on each other"
    if "sinkhorn" in str(args.moe_router_load_balancing_type):
        return "sinkhorn routing looks at all tokens of a batch together"
    if args.moe_router_fusion:
        return "--moe-router-fusion chooses experts in a kernel that cannot be told to repeat it"
    if args.fp8 or args.fp4:
        return "fp8 and fp4 share scaling factors between documents, and remember them"
    if args.cuda_graph_impl != "none":
        return "CUDA graphs fix what is run"
    return None


@dataclass(frozen=True)
class Verdict:
    """What was seen over all ranks."""

    tokens: list[int]
    """Tokens watched of each group."""
    moved: list[int]
    """Those of each group whose loss is another one, by as little as a bit."""
    worst: list[float]
    """The largest change of a token's loss in each group, in nats."""
    not_finite: int = 0
    """Losses that are no numbers or endless, before or after."""

    def complaint(self) -> str | None:
        """What is wrong, or None."""
        for group, what in (
            (OTHERS, "documents of a pack see each other: a change in one moved"),
            (EARLIER, "attention is not causal: a change of later tokens moved"),
        ):
            if self.moved[group]:
                return (
                    f"{what} the losses of {self.moved[group]} of {self.tokens[group]} tokens that must "
                    f"not depend on it, by up to {self.worst[group]:.3g}"
                )
        if not self.moved[LATER] and not self.not_finite:
            return (
                f"the check sees nothing: tokens were replaced, and none of {self.tokens[LATER]} "
                f"losses that depend on them changed (a student that is its teacher has nothing to learn)"
            )
        return None


def check_isolation(
    start: TrainStart,
    *,
    forward_step: ForwardStep,
    args: argparse.Namespace,
    say: Callable[[str], None],
) -> None:
    """Run the check; every rank must call it.

    Args:
        start: model and training data of the run.
        forward_step: the run's own.
        args: validated arguments.
        say: tells the outcome on rank 0.

    Raises:
        RunStopped: on every rank, when documents leak into each other.
    """
    if not args.isolation_check or args.iteration >= (args.train_iters or 0):
        return
    reason = reason_not_to_check(args)
    if reason is not None:
        say(f"isolation of documents is not checked: {reason}")
        return
    began = time.perf_counter()
    micro_batches = _micro_batches(start.data_iterator, args)
    with undisturbed(start.model), same_experts(start.model):
        before, after = _losses(start.model, micro_batches, forward_step, args)
    verdict = _compare(before, after)
    complaint = verdict.complaint()
    if complaint is not None:
        raise RunStopped(
            f"before step {args.iteration + 1}: {complaint}. Nothing was trained. With attention of your "
            f"own, make it heed `packed_seq_params`; where this is wanted, --no-isolation-check"
        )
    if verdict.not_finite:  # of which the step itself complains
        say(f"isolation of documents is not checked: {verdict.not_finite} losses are not finite")
        return
    if not verdict.tokens[OTHERS]:
        say("isolation of documents is not checked: no pack looked at holds two of them")
        return
    say(
        f"isolation checked in {time.perf_counter() - began:.2f} s: {verdict.tokens[OTHERS]} losses stay "
        f"the same bit for bit when another document changes, {verdict.tokens[LATER]} of its own follow"
    )


def _micro_batches(data_iterator: Any, args: argparse.Namespace) -> tuple[Micro, Micro] | None:
    """The packs as they are and with one document changed; None where another rank reads the data."""
    if isinstance(data_iterator, list):
        data_iterator = data_iterator[0]  # virtual stages read the same
    if data_iterator is None:
        return None
    size = args.eval_micro_batch_size
    packs, lengths = _choose_packs(data_iterator.dataset, data_iterator.next_index, size)
    vocabulary = args.vocab_size or args.padded_vocab_size
    return perturbed(packs, lengths, vocabulary, _of_media(data_iterator.dataset))


def _of_media(dataset: SFTDataset) -> tuple[int, ...]:
    """Tokens that stand for pictures and the like: the model wants as many as it is given pictures."""
    if not isinstance(dataset, PictureDataset):
        return ()
    layout = dataset.processor.layout
    return (layout.image_id, *layout.refused_ids)


def _choose_packs(dataset: SFTDataset, start: int, size: int) -> tuple[Micro, list[int]]:
    """The first micro batch from `start` on with two documents, and the documents' lengths.

    Lengths count padding as documents and add up to all tokens of the micro batch.
    """
    last = max(0, len(dataset) - size)
    chosen = min(start, last)
    for first in range(chosen, min(chosen + LOOKED_AT * size, last + 1), size):
        numbers = [dataset.global_index(index) for index in range(first, first + size)]
        if sum(len(dataset.document_indices(number)) for number in numbers) > 1:
            chosen = first
            break
    packs = [dataset[index] for index in range(chosen, chosen + size)]
    seen = isinstance(dataset, PictureDataset)
    passed = {"rope_positions", *PICTURE_FIELDS} if seen else set()
    names = packs[0].keys() - passed
    batch = {name: torch.stack([pack[name] for pack in packs]) for name in names}
    if isinstance(dataset, PictureDataset):
        batch |= dataset.join(packs)
    return batch, row_lengths(batch["document_lengths"])


def perturbed(
    packs: Micro, lengths: list[int], vocabulary: int, fixed: Sequence[int] = ()
) -> tuple[Micro, Micro]:
    """Two versions of a micro batch that differ in one document, with watched tokens in the mask.

    Args:
        packs: `input_ids`, `loss_mask` and `document_lengths`, each [micro batch, seq_length].
        lengths: tokens of each document, in order; padding counts as documents.
        vocabulary: number of token ids.
        fixed: tokens that are neither replaced nor put in.

    Returns:
        Both with the same `loss_mask`, 1 where a token is watched, and `groups`. About as many tokens are
        watched as are trained in `packs`, so that the logits take no more memory than a step's.
    """
    ends = torch.tensor(lengths).cumsum(0)
    long_enough = [number for number, length in enumerate(lengths) if length >= 4]
    # Near the middle, so that there are neighbours on either side; not the last, whom nobody follows.
    inner = [number for number in long_enough if number < len(lengths) - 1] or long_enough
    changed = min(inner, key=lambda number: abs(2 * number + 1 - len(lengths)), default=0)
    end = int(ends[changed])
    begin, length = end - lengths[changed], lengths[changed]
    first = min(begin + max(1, length // 3), end)
    last = min(begin + max(2, 2 * length // 3), end)

    ids = packs["input_ids"].flatten()
    kept = torch.isin(ids, torch.tensor(list(fixed), dtype=ids.dtype))
    if bool(kept[first:last].any()):
        # Behind the picture, and so that something of the document still follows.
        first = int(torch.where(kept[begin:end])[0].max()) + begin + 1
        last = first + max(1, min(last - begin, end - first) // 2)

    shape = packs["input_ids"].shape
    row = torch.arange(packs["input_ids"].numel())
    trained = int(packs["loss_mask"].sum())
    watched = row % max(1, len(row) // max(trained, 1)) == 0
    # A regular choice, and the first label of each document: its loss sees the fewest neighbours.
    begins = ends - torch.tensor(lengths)
    watched[begins[begins + 1 < ends] + 1] = True
    groups = torch.where((begin <= row) & (row < end), LATER, OTHERS)
    groups[begin:first] = EARLIER
    watched[last : min(last + 4, end)] = True
    watched[max(begin, first - 4) : first] = True
    watched[first:last] = False  # their own labels change

    other = ids.clone()
    # Another token for certain, and one that the model knows.
    other[first:last] = (ids[first:last] + vocabulary // 2) % vocabulary
    while bool((put := torch.isin(other, kept.new_tensor(fixed, dtype=ids.dtype)) & ~kept).any()):
        other[put] = (other[put] + 1) % vocabulary
    same = {
        **packs,  # stored features, if any: of the tokens as they were
        "loss_mask": watched.to(torch.uint8).view(shape),
        "groups": groups.view(shape),
        "document_lengths": packs["document_lengths"],
    }
    return (
        {**same, "input_ids": ids.view(shape)},
        {**same, "input_ids": other.view(shape)},
    )


def _losses(
    model: list[torch.nn.Module],
    micro_batches: tuple[Micro, Micro] | None,
    forward_step: ForwardStep,
    args: argparse.Namespace,
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Losses and groups of the watched tokens of both versions; empty but on the last stage."""
    # An interleaved pipeline wants a multiple of its stages.
    repeats = parallel_state.get_pipeline_model_parallel_world_size() if len(model) > 1 else 1
    data = [iter(micro_batches * repeats) if micro_batches else None for _ in model]
    collected = trial_losses(
        model, data if len(model) > 1 else data[0], 2 * repeats, forward_step, args
    )
    return collected[0:1], collected[1:2]


def _compare(before: list[tuple[Tensor, Tensor]], after: list[tuple[Tensor, Tensor]]) -> Verdict:
    """Count over all ranks what moved; every rank of a tensor parallel group sees the same."""
    sums = torch.zeros(3, GROUPS, dtype=torch.float64, device=current_device())
    worst = torch.zeros_like(sums[0])
    first_of_group = parallel_state.get_tensor_model_parallel_rank() == 0
    for (old, groups), (new, _) in zip(before, after, strict=True):
        # Not a number before and after is no change.
        same = (old == new) | (torch.isnan(old) & torch.isnan(new))
        change = torch.where(same, 0.0, (new.double() - old.double()).abs()).nan_to_num(torch.inf)
        worst.index_reduce_(0, groups, change, "amax")
        if first_of_group:
            lost = ~(old.isfinite() & new.isfinite())
            seen = torch.stack([torch.ones_like(change), (~same).double(), lost.double()])
            sums.index_add_(1, groups, seen)
    torch.distributed.all_reduce(sums)
    torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
    tokens, moved, lost_of = ([round(count) for count in row] for row in sums.tolist())
    return Verdict(tokens, moved, worst.tolist(), sum(lost_of))
