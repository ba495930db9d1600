"""Which way keeps documents of a pack apart in the model at hand: found out by trying, before training.

Four short documents of random tokens go through the run's own model, weights and layout:

    each alone         one row, the model's own attention: the truth
    all in a pack      every loss must be the truth, up to rounding
    one changed        no loss of another document, nor of its own earlier tokens, may move by one bit;
                       of its later tokens some must, or nothing was seen

Windows, chunks and lengths at which rotary embeddings change are made so short for it that the documents
are longer. With experts the second pass repeats the first one's choices (`model/router.py`). All ranks run
the same and agree on the way; the first of `WAYS` that keeps them apart is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from post_training.errors import RunStopped
from post_training.hf_models.packing import WAYS
from post_training.model.router import RepeatedChoices

LENGTHS = (13, 6, 17, 9)
CHANGED = 2
"""The document of which tokens are replaced: those at 6, 7 and 8, and the last one, which what looks back a
few tokens only (a convolution) hands on to the next document."""
SHORT = 4
"""Tokens of windows and chunks meanwhile."""
CLOSE = 1e-5
"""A loss of a packed document may differ by so much of itself (or of 1, below) from that of it alone, in
fp32. In bf16, where each of several layers rounds to 8 bits, by `ROUNDED`."""
ROUNDED = 0.1
_WINDOWS = ("sliding_window", "attention_chunk_size")


def choose_way(model: Any, say: Callable[[str], None] | None = None) -> str:
    """The first way that keeps documents apart; every rank must call it.

    Args:
        model: an `HFModel` with its weights, sharded or whole, inside its own `forward`.
        say: tells the outcome.

    Raises:
        RunStopped: there is none.
    """
    found: dict[str, str | None] = {}
    with _undisturbed(model), _short_windows(model.model), RepeatedChoices() as choices:
        alone = _alone(model)
        for way in WAYS:
            found[way] = _agreed(_complaint(model, way, alone, choices))
            if found[way] is None:
                break
    tried = [f"{way}: {complaint}" for way, complaint in found.items() if complaint]
    name = type(model.model).__name__
    if found[way] is not None:
        raise RunStopped(
            f"{name} keeps documents of a pack apart in no way ({'; '.join(tried)}): it cannot be trained "
            f"on packs, nor on rows side by side"
        )
    if say is not None:
        passed = f" ({'; '.join(tried)})" if tried else ""
        say(f"packing of {name}: {way}{passed}")
    return way


def _agreed(complaint: str | None) -> str | None:
    """What any rank complains of, on all of them."""
    distributed = torch.distributed
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return complaint
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, complaint)
    return next((other for other in every if other is not None), None)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards all is as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def _short_windows(model: Any) -> Iterator[None]:
    """Let the probe's documents be longer than windows and chunks, whatever these are."""
    places = {id(model.config): model.config}
    for module in model.modules():
        places[id(module)] = module
        if (config := getattr(module, "config", None)) is not None:
            places[id(config)] = config
    before = [
        (place, name, vars(place)[name])
        for place in places.values()
        for name in _WINDOWS
        if type(vars(place).get(name)) is int
    ]
    for place, name, value in before:
        setattr(place, name, min(value, SHORT))
    try:
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _tokens(vocabulary: int) -> tuple[Tensor, Tensor]:
    """The pack, as it is and with one document changed: int64 [tokens] each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (sum(LENGTHS),), generator=generator)
    other = ids.clone()
    begin = sum(LENGTHS[:CHANGED])
    for place in (6, 7, 8, LENGTHS[CHANGED] - 1):
        other[begin + place] = (ids[begin + place] + vocabulary // 2) % vocabulary
    return ids, other


def _groups() -> tuple[Tensor, Tensor]:
    """Which tokens must not move when the document is changed, and which of them may: bool [tokens] each.

    The loss of a token is that of the next one, so the last one before a changed token may move.
    """
    begin = sum(LENGTHS[:CHANGED])
    row = torch.arange(sum(LENGTHS))
    later = (row >= begin + 9) & (row < begin + LENGTHS[CHANGED] - 2)
    fixed = (row < begin + 5) | (row >= begin + LENGTHS[CHANGED])
    return fixed, later


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Of each token the loss of the next one in its document, 0 at the last: float32 [tokens]."""
    labels = torch.roll(ids, -1)
    losses = F.cross_entropy(logits.float(), labels.to(logits.device), reduction="none").cpu()
    losses[torch.tensor(LENGTHS).cumsum(0) - 1] = 0.0
    return losses


def _alone(model: Any) -> Tensor:
    """The losses of the documents one at a time, by the model's own attention."""
    ids, _ = _tokens(_vocabulary(model))
    model.documents.begin("stock", None)
    parts = []
    for document in ids.to(_device(model)).split(LENGTHS):
        positions = torch.arange(len(document), device=document.device).unsqueeze(0)
        parts.append(model.run(document.unsqueeze(0), positions, None)[0])
    return _losses(torch.cat(parts), ids)


def _complaint(model: Any, way: str, alone: Tensor, choices: RepeatedChoices) -> str | None:
    """What is wrong with a way, or None."""
    documents = model.documents
    row = torch.arange(sum(LENGTHS), device=_device(model))
    documents.calls = 0
    passes = []
    try:
        for begin, ids in zip(
            (choices.choose, choices.repeat), _tokens(_vocabulary(model)), strict=True
        ):
            begin()
            logits = model.packed_logits(way, ids.to(row.device), list(LENGTHS), row)
            passes.append(_losses(logits, ids))
    except (ValueError, KeyError, NotImplementedError) as error:
        return f"not taken by the model ({str(error).splitlines()[0][:80]})"
    if way == "attention" and not documents.calls:
        return "the model does not ask for its attention"
    before, after = passes
    fixed, later = _groups()
    moved = before != after
    if bool(moved[fixed].any()):
        worst = float((before - after)[fixed].abs().max())
        return (
            f"a change in one document moves {int(moved[fixed].sum())} losses by up to {worst:.2g}"
        )
    if not bool(moved[later].any()):
        return "a change in a document moves none of its own losses"
    reduced = model.config.autocast_dtype != torch.float32 or _dtype(model) != torch.float32
    apart = float(((before - alone).abs() / alone.abs().clamp(min=1.0)).max())
    if not apart <= (ROUNDED if reduced else CLOSE):
        return f"packed documents are {apart:.2g} from the same alone"
    return None


def _vocabulary(model: Any) -> int:
    return int(model.model.config.get_text_config().vocab_size)


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _dtype(model: Any) -> torch.dtype:
    return next(model.parameters()).dtype
