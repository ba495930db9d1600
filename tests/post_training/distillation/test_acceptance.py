"""How many drafted tokens are accepted, with draft heads whose guesses are known."""

from types import SimpleNamespace

import pytest
import torch

from post_training.distillation.acceptance import (
    acceptance_length,
    has_draft_head,
    report_acceptance,
)
from tests.helpers.launch import run_ranks


class Counter(torch.nn.Module):
    """Writes the next number, and drafts the ones after it; `wrong` names the draft that is off."""

    decoder = SimpleNamespace(layers=[None])

    def __init__(self, heads, wrong=None):
        super().__init__()
        self.heads, self.wrong = heads, wrong
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.draft = SimpleNamespace(propose=self.propose)

    def propose(self, model, tokens):
        base = tokens[:, -1:] + 1
        drafts = [base + 1 + head + (head == self.wrong) for head in range(self.heads)]
        return base, torch.cat(drafts, dim=-1)


@pytest.mark.parametrize(
    ("heads", "wrong", "expected"),
    [
        (2, None, 3.0),  # the model's own token and both drafts, each pass
        (2, 0, 1.0),  # the second draft is right, but stands behind a wrong one
        (2, 1, 2.0),
        (1, None, 2.0),
    ],
)
def test_acceptance_length(heads, wrong, expected):
    model = Counter(heads, wrong)
    assert has_draft_head(model) and not has_draft_head(torch.nn.Linear(1, 1))
    assert acceptance_length(model, [5], new_tokens=12) == expected


def _report_on_ranks(pipeline: int) -> tuple[float | None, str]:
    """What a rank reports of a model whose heads fail on rank 1, or the error it meets."""
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=pipeline)
    model = Counter(heads=1)
    if torch.distributed.get_rank() == 1:
        del model.weight  # where it is asked for the device
    try:
        return report_acceptance([model], [[5]], 4), ""
    except StopIteration as error:
        return None, repr(error)


def test_cut_into_stages_it_is_skipped_on_all_ranks():
    assert run_ranks(_report_on_ranks, 2, 2) == [(None, ""), (None, "")]


def test_an_error_on_one_rank_is_not_swallowed():
    """Reference's fault: exceptions in the acceptance report are swallowed on one rank."""
    (first, _), (second, error) = run_ranks(_report_on_ranks, 2, 1)
    assert first == 2.0 and second is None and "StopIteration" in error
