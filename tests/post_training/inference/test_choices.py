import pytest

from post_training.inference.choices import chosen

COLOURS = ["red", "dark red", "blue", "A lot"]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", 1),
        ("b", 1),
        ("(c)", 2),
        ("C.", 2),
        ("**C.** blue", 2),
        ("C. blue", 2),
        ("C) because I see the sky", 2),
        ("C blue", 2),
        ("C\n\nBecause red would be warm.", 2),
        ("b\nred is warm", 1),
        ("A lot\nof red", None),
        ("A. blue", None),
        ("E", None),
        ("E. blue", None),
        ("blue", 2),
        (" Blue. ", 2),
        ("It is dark red", 1),
        ("It is blue, not red", None),
        ("A lot", 3),
        ("a lot of it", 3),
        ("A blue one", 2),
        ("bluebird", None),
        ("", None),
        ("I do not know", None),
        ("<think>A or B? It is blue.</think>\n\nA", 0),
        ("<think>The answer is A", None),
        ("the answer is B. No, the answer is: C", 2),
        ("Answer: (B)", 1),
        (r"So \boxed{A}, no: \boxed{\text{C}}", 2),
        ("<answer>A</answer> <answer>dark red</answer>", 1),
        ("<think>x</think><answer>B</answer>", 1),
        (r"The answer is A, \boxed{2}", None),
    ],
)
def test_answers_are_read_by_the_rules(answer, right):
    assert chosen(answer, COLOURS) == right
