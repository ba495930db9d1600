"""Where gloo and Megatron's collectives disagree.

Upstream: megatron-core 0.19.2.

- `core/transformer/moe/token_dispatcher.py` turns the split sizes of its all-to-all into numbers while it
  moves them from the GPU to the host; where they lie on the host already they stay tensors, which torch's
  `all_to_all_single` does not take.
- `core/tensor_parallel/mappings.py` gathers parts of different sizes over the expert tensor parallel group;
  gloo wants parts of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from post_training.platform.patches import in_place_of


def gather_uneven(part: Tensor, group: ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """All-gather parts whose first dimensions differ.

    Args:
        part: this rank's, [sizes[rank], ...].
        group: the ranks that take part.
        sizes: the first dimension of each rank's part.

    Returns:
        [sum of sizes, ...], in the order of the ranks.
    """
    longest = max(sizes)
    if longest == 0:
        return part.clone()  # no token chose any of these experts
    padded = part.new_zeros(longest, *part.shape[1:])
    padded[: part.shape[0]] = part
    whole = part.new_empty(longest * len(sizes), *part.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, padded, group=group)
    rows = whole.split(longest)
    return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])


def apply() -> None:
    """Make both work on CPU."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    def to_host(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return value.numpy() if as_numpy and isinstance(value, Tensor) else value

    setattr(token_dispatcher, "maybe_move_tensor_to_cpu", to_host)  # noqa: B010

    @in_place_of((mappings, "_gather_along_first_dim"))
    def gather_any(
        gather: Any, part: Tensor, group: ProcessGroup, sizes: Any = None, shared: bool = False
    ) -> Any:
        if sizes is None or group.size() == 1:
            return gather(part, group, sizes, shared)
        return gather_uneven(part, group, sizes)
