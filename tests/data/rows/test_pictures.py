from typing import Any

import pytest

from data.errors import DataError, RowError
from data.rows.conversation import Conversation
from data.rows.user_converter import UserConverter
from tests.data.rows.test_registry import convert

SAID = {"role": "assistant", "content": "A cat."}
TEXT = {"type": "text", "text": "What is it?"}


def asked(*parts):
    return {"messages": [{"role": "user", "content": [*parts, TEXT]}, SAID]}


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "url": "file:///a.png", "text": None}, "file:///a.png"),
        ({"type": "image", "base64": "QQ=="}, "data:;base64,QQ=="),
        ({"type": "image", "bytes": b"x"}, b"x"),
        ({"type": "image", "image": {"bytes": b"x", "path": None}}, {"bytes": b"x", "path": None}),
        ({"type": "image_url", "image_url": {"url": "data:x", "detail": "low"}}, "data:x"),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
        ({"type": "input_image", "image_url": "a.png", "detail": "low"}, "a.png"),
    ],
)
def test_parts_keep_their_order_and_pictures_stand_beside(part, found):
    row = convert(asked(TEXT, part, part))
    kinds = [piece["type"] for piece in row.messages[0]["content"]]
    assert kinds == ["text", "image", "image", "text"]
    assert row.pictures == [found, found] and not row.unread


def test_columns_fill_the_places():
    row = convert({**asked({"type": "image"}, {"type": "image"}), "images": ["a", "b"]})
    assert row.pictures == ["a", "b"] and not row.unread
    text = [{"from": "human", "value": "<image>\nand <image>?"}, {"from": "gpt", "value": "A cat."}]
    row = convert({"conversations": text, "image": "a", "more": "b"}, image_keys=("image", "more"))
    assert [piece.get("text") for piece in row.messages[0]["content"]] == [
        None,
        "\nand ",
        None,
        "?",
    ]
    assert row.pictures == ["a", "b"]
    row = convert({"messages": [{"role": "user", "content": "Hi"}, SAID], "images": []})
    assert row.messages[0]["content"] == "Hi" and row.pictures == []


ROBO = {"question": "Where?", "choices": "['up', 'down']", "correct_answer": 1, "image": b"x"}


def test_rows_with_choices():
    row = convert(ROBO)
    assert row.messages[0]["content"][1]["text"] == "Where?\nA. up\nB. down"
    assert row.messages[1]["content"] == "B. down" and row.pictures == [b"x"]
    named = {"q": "Where?", "c": ["up", "down"], "a": "A", "left": "l.png", "right": "r.png"}
    keys = {
        "prompt_key": "q",
        "choice_key": "c",
        "answer_key": "a",
        "image_keys": ("left", "right"),
    }
    row = convert(named, **keys, answer_form="letter")
    assert row.messages[1]["content"] == "A" and row.pictures == ["l.png", "r.png"]
    free = convert({"question": "Where?", "answer": "there", "image": b"x"}, image_keys=("image",))
    assert free.messages[1]["content"] == "there" and free.pictures == [b"x"]
    assert convert({**ROBO, "image": None}).messages[0]["content"] == "Where?\nA. up\nB. down"
    placed = convert({**ROBO, "question": "Where is <image> going?"}).messages[0]["content"]
    assert [part.get("text") for part in placed] == ["Where is ", None, " going?\nA. up\nB. down"]


@pytest.mark.parametrize(
    ("row", "options", "what"),
    [
        (asked({"type": "image"}), {}, "1 image parts hold none"),
        ({**asked({"type": "image"}), "images": ["a", "b"]}, {}, "2 pictures for 1"),
        ({**asked(), "images": ["a"]}, {}, "--ignore-columns images"),
        ({**asked({"type": "image"}), "images": [None]}, {}, "null"),
        ({**ROBO, "image": "x"}, {"image_keys": ("photo",)}, "question, choices, correct_answer, image"),
        (ROBO, {"answer_key": "letter"}, "no column 'letter'"),
        (ROBO, {"choice_key": "options"}, "no column 'options'"),
        ({"question": "?", "answer": float("nan")}, {"answer_key": "answer"}, "no answer"),
        ({**ROBO, "correct_answer": "C"}, {}, "outside the choices"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [
            {"type": "image", "image": "a"}]}]}, {}, "only a user's may"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, SAID]}, {}, "video"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(row, options, what):
    with pytest.raises(RowError, match=what):
        convert(row, **options)


def test_flags_of_no_use_are_refused():
    with pytest.raises(DataError, match="--image-keys image"):
        convert({"question": "?", "answer": "!"}, "question", image_keys=("image",))
    with pytest.raises(DataError, match="--answer-form letter"):
        convert(asked(), answer_form="letter")


def test_a_converter_of_ones_own_may_give_pictures():
    messages: Any = [{"role": "user", "content": [{"type": "image"}, TEXT]}, SAID]
    results: list[Any] = [
        Conversation(messages, pictures=["a"]),
        {"messages": messages, "images": ["a"]},
    ]
    found = UserConverter("mine", lambda row: results[row["number"]])
    assert [found({"number": number}).pictures for number in range(2)] == [["a"], ["a"]]
