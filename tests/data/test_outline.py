import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.answer_spans import AnswerFinder
from data.conversation import Conversation
from data.errors import RowError
from data.outline import outline_key
from tests.data.conftest import CHATML
from tests.data.templates import THINKING, chat, finder

# Puts the system prompt behind the question, as some Mistral templates do.
MOVED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content }}"
    "{% if messages[0].role == 'system' %}{{ ' ' + messages[0].content }}{% endif %}"
    "{{ ' [/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}{% endif %}"
    "{% endfor %}"
)
# Writes something else for some contents.
SHOUTING = CHATML.replace(
    "{%- for message in messages %}",
    "{%- for message in messages %}{% if '!' in message.content %}LOUD {% endif %}",
)


def count_marked_renderings(monkeypatch):
    calls = []
    marked = AnswerFinder._marked

    def counted(*arguments):
        calls.append(1)
        return marked(*arguments)

    monkeypatch.setattr(AnswerFinder, "_marked", counted)
    return calls


def test_further_rows_of_a_shape_are_rendered_once(monkeypatch):
    found = finder(CHATML)
    calls = count_marked_renderings(monkeypatch)
    for number in range(5):
        rendering = found.find(chat(f"Question {number}", f"Answer {number}"))
        turn = rendering.turns[0]
        assert rendering.text[turn.start : turn.end] == f"Answer {number}<|im_end|>"
    assert len(calls) == 1


def test_row_that_departs_from_the_outline_is_told_apart_by_marks(monkeypatch):
    found = finder(SHOUTING)
    calls = count_marked_renderings(monkeypatch)
    for answer in ("Yes.", "No!", "Yes."):
        rendering = found.find(chat("Sure?", answer))
        turn = rendering.turns[0]
        assert rendering.text[turn.start : turn.end] == answer + "<|im_end|>"
    assert len(calls) >= 2


def test_moved_messages_have_no_outline():
    found = finder(MOVED)
    for text in ("one", "two", "two"):
        messages = [
            {"role": "system", "content": text},
            {"role": "user", "content": text},
            {"role": "assistant", "content": "Done."},
        ]
        rendering = found.find(Conversation(messages))
        turn = rendering.turns[0]
        assert rendering.text[turn.start : turn.end] == "Done.</s>"


def test_shapes_with_more_than_text_have_none():
    assert outline_key(chat("Hi", "Hello.").messages, None) == ("user", "assistant")
    assert outline_key(chat("Hi", "").messages, None) is None
    assert outline_key(chat("Hi", "Hello.").messages, [{}]) is None
    assert outline_key(chat("Hi", "a</think>b").messages, None) is None
    assert outline_key(chat("Hi", "Hello.", reasoning_content="r").messages, None) is None


def outcome(found, conversation):
    try:
        return found.find(conversation).turns
    except RowError as error:
        return error.reason


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cn"]), max_size=8)


@pytest.mark.parametrize("source", [CHATML, THINKING, SHOUTING, MOVED])
@given(rows=st.lists(st.tuples(words, words, words, words), min_size=2, max_size=5))
def test_turns_are_the_same_with_and_without_the_short_cut(source, rows):
    found = finder(source)
    for texts in rows:
        conversation = chat(*texts)
        assert outcome(found, conversation) == outcome(finder(source), conversation)
