"""The scan of packed documents, one by one, against other ways to compute it: forward and backward passes.

    python benchmarks/state_space.py

The row of tokens is computed per document (as in training), with masks over the whole row, as one document
(without any reset: what a pass over the row costs at least), and by the scan of transformers per document
and over the row. Times are ratios to the first way.
"""

# ruff: noqa: E402 - the platform layer must be in place before Megatron is imported

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from post_training import platform

platform.apply()

import torch
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

from post_training.model.mamba import CHUNK, scan

TOKENS, DOCUMENTS, HEADS, HEAD_DIM, GROUPS, STATE = 2048, 21, 32, 64, 8, 128


def theirs(x: Tensor, steps: Tensor, rates: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The scan of transformers."""
    found: Tensor = mamba2_chunk_scan(x, steps, rates, b, c, chunk_size=CHUNK)
    return found


def masked(
    x: Tensor, steps: Tensor, rates: Tensor, b: Tensor, c: Tensor, document: Tensor
) -> Tensor:
    """All chunks of the row in turn; scores and states of other documents are masked."""
    decay_all, state, outputs = steps * rates, None, []
    before = document.new_full((), -1)
    for at in range(0, x.shape[1], CHUNK):
        part = slice(at, at + CHUNK)
        own = document[part]
        decay = decay_all[:, part].cumsum(1)
        same = (own[:, None] == own[None]).tril()
        between = (decay.unsqueeze(2) - decay.unsqueeze(1)).masked_fill(
            ~same[None, :, :, None], float("-inf")
        )
        wide = [t[:, part].repeat_interleave(HEADS // GROUPS, dim=2) for t in (b, c)]
        weighted = x[:, part] * steps[:, part].unsqueeze(-1)
        scores = torch.einsum("blhn,bshn->blsh", wide[1], wide[0]) * between.exp()
        y = torch.einsum("blsh,bshp->blhp", scores, weighted)
        if state is not None:
            seen = (own == before)[None, :, None] * decay.exp()
            y = y + torch.einsum("blhn,bhpn->blhp", wide[1] * seen.unsqueeze(-1), state)
        last = decay[:, -1]
        stays = (own == own[-1])[None, :, None] * (last.unsqueeze(1) - decay).exp()
        added = torch.einsum("blhn,blhp->bhpn", wide[0], weighted * stays.unsqueeze(-1))
        goes_on = (own[-1] == before) * last.exp()[..., None, None]
        state = added if state is None else state * goes_on + added
        outputs.append(y)
        before = own[-1]
    return torch.cat(outputs, dim=1)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cuts = torch.randperm(TOKENS - 1)[: DOCUMENTS - 1].add(1).sort().values.tolist()
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, TOKENS], strict=True)]
    document = torch.repeat_interleave(torch.arange(DOCUMENTS), torch.tensor(lengths))
    x = torch.randn(1, TOKENS, HEADS, HEAD_DIM)
    steps, rates = torch.rand(1, TOKENS, HEADS) * 0.1, -torch.rand(HEADS) * 15 - 1
    b, c = (torch.randn(1, TOKENS, GROUPS, STATE) for _ in range(2))
    inputs = [t.requires_grad_() for t in (x, steps, rates, b, c)]

    def per_document(way: Callable[..., Tensor]) -> Tensor:
        parts = zip(*(t.split(lengths, dim=1) for t in (x, steps, b, c)), strict=True)
        return torch.cat([way(p, s, rates, q, r) for p, s, q, r in parts], dim=1)

    def ours(*given: Tensor) -> Tensor:
        return scan(*given)[0]

    ways: dict[str, Callable[[], Tensor]] = {
        "per document": lambda: per_document(ours),
        "whole row, with masks": lambda: masked(x, steps, rates, b, c, document),
        "whole row, no reset": lambda: ours(x, steps, rates, b, c),
        "transformers, per document": lambda: per_document(theirs),
        "transformers, whole row": lambda: theirs(x, steps, rates, b, c),
    }
    truth, first = ways["per document"](), 0.0
    print(f"{TOKENS} tokens in {DOCUMENTS} documents, {HEADS} heads of {HEAD_DIM}, state {STATE}")
    for name, way in ways.items():
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            y = way()
            torch.autograd.grad(y.square().sum(), inputs)
            times.append(time.perf_counter() - begin)
        took = statistics.median(times)
        first = first or took
        apart = ((y - truth).norm() / truth.norm()).item()
        print(f"{name:28} {took / first:5.2f} x the time   {apart:8.1e} from the first", flush=True)


if __name__ == "__main__":
    main()
