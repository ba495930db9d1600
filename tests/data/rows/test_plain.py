import pytest

from data.errors import RowError
from data.rows.converters import FormatOptions
from data.rows.plain import plain_row
from data.rows.registry import detect_format


def test_ids_are_trained_as_labels_and_masks_say():
    ids = {"input_ids": [5, 6, 7, 8]}

    def trained(**more):
        return list(plain_row("tokens", {**ids, **more}, FormatOptions()).trained)

    assert detect_format(ids, FormatOptions()) == "tokens"
    assert trained() == [True] * 4
    assert trained(labels=[-100, 6, -100, 8]) == [False, True, False, True]
    assert trained(loss_mask=[0, 0, 1, 1], labels=[5, 6, 7, -100]) == [False, False, True, False]
    padded = plain_row("tokens", {**ids, "attention_mask": [0, 1, 1, 0]}, FormatOptions())
    assert (list(padded.ids), padded.unread) == ([6, 7], ())
    assert plain_row("tokens", {**ids, "position_ids": [0, 1, 0, 1]}, FormatOptions()).unread == (
        "position_ids",
    )


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": []},
        {"input_ids": [1, -2]},
        {"input_ids": [1, "a"]},
        {"input_ids": [1, True]},
        {"input_ids": [1, 2], "labels": [1]},
        {"input_ids": [1, 2], "labels": [2, -100]},  # shifted
        {"input_ids": [1, 2], "loss_mask": [0, 2]},
        {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]},
    ],
)
def test_ids_that_contradict_themselves_are_refused(row):
    with pytest.raises(RowError):
        plain_row("tokens", row, FormatOptions())


def test_text_is_the_text_column_or_the_one_that_is_named():
    assert detect_format({"text": "a", "id": 1}, FormatOptions()) == "text"
    named = FormatOptions(response_key="body", ignore_columns=("id",))
    assert plain_row("text", {"body": "a", "id": 1, "b": 2}, named).unread == ("b",)
    for row in ({"text": ""}, {"text": None}, {"body": "a"}):
        with pytest.raises(RowError, match="text"):
            plain_row("text", row, FormatOptions())
