"""The tokens of a cut vocabulary: those that are trained most often."""

import numpy as np
import torch

from post_training.distillation import draft_vocabulary


def test_trained_tokens_are_counted_and_equals_go_to_the_lower(monkeypatch):
    monkeypatch.setattr(draft_vocabulary, "_AT_ONCE", 4)
    documents = [
        (np.array([9, 9, 9, 5, 7], np.int32), np.array([0, 0, 0, 1, 1], np.uint8)),
        (np.array([7, 3, 5, 7], np.int32), np.array([1, 1, 1, 0], np.uint8)),
    ]
    # 5 and 7 twice, 3 once, the others never; 9 only where it is not trained.
    find = draft_vocabulary.most_trained_tokens
    assert torch.equal(find(documents, 2, 12), torch.tensor([5, 7]))
    assert torch.equal(find(documents, 4, 12), torch.tensor([0, 3, 5, 7]))
