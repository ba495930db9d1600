"""How many drafted tokens are accepted, with draft heads whose guesses are known."""

import pytest
import torch

from post_training.speculative import acceptance_length, has_draft_head


class Counter(torch.nn.Module):
    """Writes the next number, and drafts the ones after it; `wrong` names the draft that is off."""

    def __init__(self, heads, wrong=None):
        super().__init__()
        self.heads, self.wrong = heads, wrong
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def pseudo_speculative_generate(self, input_ids):
        base = input_ids[:, -1:] + 1
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
