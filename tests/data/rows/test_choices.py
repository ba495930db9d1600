import numpy as np
import pytest

from data.errors import RowError
from data.rows.choices import read_choices


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["up", "down"], 1, 1),
        (["up", "down"], 1.0, 1),
        (["up", "down"], np.int64(0), 0),
        ("['up', \"down\"]", "B", 1),
        (("up", "down"), " a ", 0),
        (np.array(["up", "down"]), "down", 1),
        ([6, 3, 4, 2], "4", 2),
        (["x", "y"], "1", 1),
        (["B", "A"], 0, 0),
        ([True, False], False, 1),
        ("[true, false]", False, 1),
    ],
)
def test_the_right_choice_is_found(choices, answer, right):
    assert read_choices(choices, answer).right == right


def test_json_is_read_as_json():
    assert read_choices(r'["\ud83d\ude00", "a\/b"]', "A").texts == ["😀", "a/b"]
    assert read_choices("['a', 'it\\'s']", "B").texts == ["a", "it's"]


@pytest.mark.parametrize(
    ("choices", "answer", "reason"),
    [
        (["up", "down"], "C", "answer outside the choices"),
        (["up", "down"], "", "answer outside the choices"),
        (["up", "down"], None, "answer outside the choices"),
        (["up", "down"], 2, "answer outside the choices"),
        (["up", "down"], -1, "answer outside the choices"),
        (["up", "down"], 0.5, "answer outside the choices"),
        (["up", "down"], True, "answer outside the choices"),
        (["up", "down"], ["up"], "answer outside the choices"),
        (["B", "A"], "A", "ambiguous answer"),
        (["3", "1", "6", "5"], 3, "ambiguous answer"),
        ("[open('x')]", 0, "bad choices"),
        ("[" * 5000, 0, "bad choices"),
        ("up, down", 0, "bad choices"),
        ("['up' 'down']", "A", "bad choices"),  # as numpy prints it
        ("['up', 'a'\n 'b']", "A", "bad choices"),
        (["up", None], "A", "bad choices"),
        (["up", float("nan")], "A", "bad choices"),
        ('["up", null]', "A", "bad choices"),
        ({"a": 1}, 0, "bad choices"),
        (["up", "up"], 0, "bad choices"),
        ([], 0, "bad choices"),
        (["x"] * 1 + list(range(30)), 0, "bad choices"),
    ],
)
def test_what_does_not_fit_is_never_the_first_choice(choices, answer, reason):
    with pytest.raises(RowError) as error:
        read_choices(choices, answer)
    assert error.value.reason == reason
