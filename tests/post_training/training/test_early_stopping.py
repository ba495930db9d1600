import pytest

from post_training.training.early_stopping import lower_is_better


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("loss", True),
        ("perplexity", True),
        ("kd_total_loss", True),
        ("draft_loss_1", True),
        ("eval_accuracy", False),
        ("eval_accuracy/glossary", False),
        ("token_accuracy", False),
    ],
)
def test_a_loss_is_known_by_its_name_and_a_kind_of_rows_is_none(metric, lower):
    assert lower_is_better(metric) is lower
