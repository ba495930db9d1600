import pytest

from data.errors import RowError
from data.rows.columns import list_unread
from data.rows.converters import FormatOptions
from data.rows.registry import converter, detect_format

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
PAIR = [USER, ASSISTANT]
CALL = {"type": "function", "id": "a", "index": 0, "function": {"name": "f", "arguments": "{}"}}


def convert(row, **options):
    columns = FormatOptions(**options)
    return converter(detect_format(row, columns), columns)(row)


def asked(**call):
    return {"messages": [USER, {**ASSISTANT, "tool_calls": [{**CALL, **call}]}]}


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"messages": PAIR, "source": "web", "empty": "", "none": None, "no": []}, ("source",)),
        ({"messages": PAIR, "prompt": "Hi", "conversations": PAIR}, ()),  # copies lose nothing
        ({"messages": PAIR, "prompt": "Ho"}, ("prompt",)),
        ({"question": "q", "answer": "a", "context": "c"}, ("context",)),
        ({"prompt": "q", "output": "a", "input": "c"}, ("input",)),
        ({"question": "q", "query": "other", "answer": "a"}, ("query",)),
        ({"instruction": "q", "output": "a", "input": "c", "text": "t"}, ("text",)),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": 2}, ("margin",)),
        ({"messages": [USER, {**ASSISTANT, "refusal": "no"}]}, ("message.refusal",)),
        ({"messages": [{**USER, "tool_calls": [CALL]}, ASSISTANT]}, ("message.tool_calls",)),
        ({"messages": [USER, {**ASSISTANT, "function_call": CALL["function"],
                              "tool_calls": [CALL]}]}, ("message.function_call",)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache": 1}]},
                       ASSISTANT]}, ("part.cache",)),
        ({"messages": [USER, {**ASSISTANT, "thinking": "x", "reasoning": "y"}]},
         ("message.reasoning",)),
        (asked(), ()),
    ],
)  # fmt: skip
def test_what_nobody_reads_is_named(row, unread):
    assert convert(row).unread == unread
    assert convert(row, ignore_columns=unread, strict_columns=True).unread == ()
    if unread:
        with pytest.raises(RowError, match=unread[0]):
            convert(row, strict_columns=True)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (asked(custom={"input": "x"}), "call.custom"),
        (asked(function={"name": "f", "kwargs": {"q": 1}}), "call.kwargs"),
        ({"messages": PAIR, "images": ["a.png"]}, "images"),
        ({"messages": [{**USER, "image": "a.png"}, ASSISTANT]}, "message.image"),
    ],
)
def test_what_must_not_be_passed_over_is_refused_unless_it_is_ignored(row, name):
    with pytest.raises(RowError, match=f"--ignore-columns {name}"):
        convert(row)
    assert convert(row, ignore_columns=(name,)).unread == ()


def test_names_are_one_line_with_metadata_last():
    counts = {"id": 3, "zeta": 1200, "source": 3, "a\nb": 1, "message.name2": 2}
    assert list_unread(counts) == "'a\\nb' 1, message.name2 2, zeta 1,200, id 3, source 3"


@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args"])
@pytest.mark.parametrize("value", [{"q": "x"}, '{"q": "x"}'])
def test_arguments_are_read_under_every_name(key, value):
    calls = convert(asked(function={"name": "f", key: value})).messages[1]["tool_calls"]
    assert calls[0]["function"]["arguments"] == {"q": "x"}
    assert (
        convert(asked(function={"name": "f", key: ""})).messages[1]["tool_calls"][0]["function"][
            "arguments"
        ]
        == {}
    )
    with pytest.raises(RowError, match="both"):
        two = {"arguments" if key != "arguments" else "args": {"q": 2}}
        convert(asked(function={"name": "f", key: value, **two}))


SCHEMA = {"name": "f", "parameters": {}}


def test_columns_and_keys_of_other_libraries_are_read():
    history = {"query": "q", "response": "r", "history": [["a", "b"]]}
    assert [m["content"] for m in convert(history).messages] == ["a", "b", "q", "r"]
    for column in ("functions", "tool_defs"):
        assert convert({"messages": PAIR, column: [SCHEMA]}).tools[0]["function"] == SCHEMA
    for key in ("train", "training"):
        assert not any(convert({"messages": [USER, {**ASSISTANT, key: False}]}).trained)
    kwargs = {"messages": PAIR, "chat_template_kwargs": {"enable_thinking": False, "x": None}}
    assert convert(kwargs).variables == {"enable_thinking": False}
    with pytest.raises(RowError, match="chat_template_kwargs"):
        convert({"messages": PAIR, "chat_template_kwargs": {"messages": []}})
    details = [
        {"type": "reasoning.text", "text": "Hm. "},
        {"type": "reasoning.text", "text": "Yes."},
    ]
    thought = convert({"messages": [USER, {**ASSISTANT, "reasoning_details": details}]})
    assert thought.messages[1]["reasoning_content"] == "Hm. Yes."
    encrypted = [{"type": "reasoning.encrypted", "data": "xyz"}]
    dark = convert({"messages": [USER, {**ASSISTANT, "reasoning_details": encrypted}]})
    assert dark.unread == ("message.reasoning_details",)
    openai = {"input": {"messages": [USER], "tools": []}, "preferred_output": [ASSISTANT],
              "non_preferred_output": [ASSISTANT]}  # fmt: skip
    assert convert(openai).messages == convert({"input": {"messages": PAIR}}).messages == PAIR
    assert not convert(openai).unread


def test_prefix_is_the_last_answer_s_alone():
    assert convert({"messages": [USER, {**ASSISTANT, "prefix": True}]}).open_end
    assert not convert({"messages": [USER, {**ASSISTANT, "prefix": False}]}).open_end
    for messages in (
        [{**USER, "prefix": True}, ASSISTANT],
        [USER, {**ASSISTANT, "prefix": 1}, *PAIR],
    ):
        with pytest.raises(RowError, match="prefix"):
            convert({"messages": messages})
