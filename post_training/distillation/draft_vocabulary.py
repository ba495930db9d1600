"""Which tokens a draft with a smaller vocabulary than its base's can write."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Tokens that are counted at a time.
_AT_ONCE = 1 << 24


def most_trained_tokens(documents: Any, count: int, vocabulary: int) -> Tensor:
    """The tokens that are trained most often; of equally frequent ones the lower.

    Args:
        documents: `Documents` or a `DocumentSet`.
        count: how many are wanted.
        vocabulary: tokens of the base.

    Returns:
        int64 [count], ascending.
    """
    totals = np.zeros(vocabulary, np.int64)
    waiting: list[Any] = []
    size = 0
    for index in range(len(documents)):
        ids, mask = documents[index]
        waiting.append(ids[mask > 0])
        size += len(waiting[-1])
        if size >= _AT_ONCE or index == len(documents) - 1:
            totals += np.bincount(np.concatenate(waiting), minlength=vocabulary)[:vocabulary]
            waiting, size = [], 0
    order = np.argsort(-totals, kind="stable")[:count]
    return torch.from_numpy(np.sort(order))
