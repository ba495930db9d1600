import json

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError, RowError
from data.rows.conversation import Conversation
from data.rows.converters import FormatOptions
from data.rows.registry import FORMATS, NAMED_DATASETS, converter, detect_format
from data.sources.chunks import read_chunk
from data.sources.readers import dataset_chunks

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"q": "x"}}}
PLAIN = [USER, ASSISTANT]


def convert(row, name=None, **options):
    mapping = FormatOptions(**options)
    return converter(name or detect_format(row, mapping), mapping)(row)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": PLAIN}, "messages"),
        ({"conversations": PLAIN}, "messages"),
        (
            {
                "conversations": [
                    {"from": "Human", "value": "Hi"},
                    {"from": "GPT", "value": "Hello."},
                ]
            },
            "sharegpt",
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello."}, "alpaca"),
        ({"instruction": "Hi", "context": None, "response": "Hello."}, "alpaca"),
        ({"question": "Hi", "answer": "Hello."}, "question"),
        ({"prompt": "Hi", "completion": "Hello."}, "question"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "question"),
        ({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}, "preference"),
        ({"chosen": PLAIN, "rejected": PLAIN}, "preference"),
        ({"conversations": [USER], "chosen": ASSISTANT, "rejected": USER}, "preference"),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": ""}, "preference"),
    ],
)
def test_format_is_detected_and_read(row, name):
    assert detect_format(row, FormatOptions()) == name
    assert convert(row).messages == PLAIN


LOOKED = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "blue"},
    {"role": "assistant", "content": "Blue."},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"prompt": "Hi", "chosen": LOOKED}, "user assistant tool assistant"),
        ({"prompt": [SYSTEM, USER], "chosen": LOOKED}, "system user assistant tool assistant"),
        ({"prompt": [USER], "chosen": [ASSISTANT, {**USER, "content": "Go on."}, ASSISTANT]},
         "user assistant user assistant"),
        ({"prompt": "Hi", "chosen": [SYSTEM, ASSISTANT]}, "system user assistant"),
        ({"prompt": [SYSTEM, USER], "chosen": PLAIN}, "system user assistant"),
        ({"prompt": "Hi", "messages": PLAIN, "chosen": PLAIN}, "user assistant"),
        ({"prompt": "Hi", "chosen": [ASSISTANT, USER, ASSISTANT]}, "assistant user assistant"),
        ({"p": "Hi", "chosen": "Hello."}, "user assistant"),
        ({"prompt": "Hi", "p": [SYSTEM, USER], "chosen": "Hello."}, "system user assistant"),
    ],
)  # fmt: skip
def test_preference_rows_keep_their_question_once(row, roles):
    keys = {"prompt_key": "p"} if "p" in row else {}
    said = convert({**row, "rejected": "No."}, **keys).messages
    assert [message["role"] for message in said] == roles.split()
    assert USER in said


@pytest.mark.parametrize(
    ("row", "keys", "reason"),
    [
        ({"chosen": "Hello."}, {}, "no prompt"),
        ({"prompt": "", "chosen": [ASSISTANT]}, {}, "no prompt"),
        ({"prompt": None, "chosen": LOOKED}, {}, "no prompt"),
        ({"chosen": "\n\nAssistant: Hello.\n\nAssistant: Hi"}, {}, "no prompt"),
        ({"prompt": "Hi", "chosen": "Hello."}, {"prompt_key": "x"}, "missing column"),
        ({"prompt": 7, "chosen": "Hello."}, {}, "bad prompt"),
        ({"prompt": PLAIN, "chosen": [{**USER, "content": "More."}, ASSISTANT]}, {}, "bad prompt"),
        ({"chosen": "Preface.\n\nHuman: Hi\n\nAssistant: Hello."}, {}, "bad chosen"),
    ],
)  # fmt: skip
def test_preference_rows_without_a_clear_question_are_refused(row, keys, reason):
    with pytest.raises(RowError) as error:
        convert(row, **keys)
    assert error.value.reason == reason


def test_query_and_history_of_alpaca_rows():
    row = {
        "instruction": "Add.", "input": "2 2", "output": "4", "system": "Be brief.",
        "history": [["Hi", "Hello."]],
    }  # fmt: skip
    said = [(m["role"], m["content"]) for m in convert(row).messages]
    assert said == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."),
        ("user", "Add.\n2 2"), ("assistant", "4"),
    ]  # fmt: skip


MESSAGE_PAIR = {"prompt": [USER], "completion": [ASSISTANT]}
ALPACA_PAIR = {"instruction": [USER], "output": [ASSISTANT]}


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({**MESSAGE_PAIR, "system": "Be brief."}, {}),
        ({"p": [USER], "c": [ASSISTANT], "s": "Be brief.", "more": ""},
         {"prompt_key": "p", "response_key": "c", "query_key": "more", "system_key": "s"}),
        ({"messages": [SYSTEM, *PLAIN], "system": "Be brief. "}, {}),
        ({**MESSAGE_PAIR, "prompt": [SYSTEM, USER], "system": "Be brief."}, {}),
        ({"prompt": [SYSTEM, USER], "chosen": [ASSISTANT], "system": "Be brief."}, {}),
    ],
)  # fmt: skip
def test_system_prompt_of_a_column_stands_before_messages_once(row, keys):
    assert convert(row, **keys).messages == [SYSTEM, *PLAIN]


@pytest.mark.parametrize(
    ("row", "keys", "found"),
    [
        ({**ALPACA_PAIR, "input": "2 2"}, {}, "bad content: .*no place for column 'input'"),
        ({**ALPACA_PAIR, "history": [["a", "b"]]}, {}, "bad content: .*for column 'history'"),
        ({**MESSAGE_PAIR, "output": [ASSISTANT], "c": "ctx"},
         {"prompt_key": "prompt", "query_key": "c"}, "bad content: .*for column 'c'"),
        ({"messages": [SYSTEM, *PLAIN], "system": "Be long."}, {}, "two system prompts: .*Be long"),
        ({"prompt": [SYSTEM, USER], "chosen": [ASSISTANT], "system": "Be long."}, {},
         "two system prompts: .*Be long"),
    ],
)  # fmt: skip
def test_column_without_a_place_among_the_messages_is_refused(row, keys, found):
    with pytest.raises(RowError, match=found):
        convert(row, **keys)


def test_columns_can_be_named():
    row = {"sys": "S", "q": "Hi", "more": "there", "a": "Hello."}
    keys = {"system_key": "sys", "prompt_key": "q", "query_key": "more", "response_key": "a"}
    said = [m["content"] for m in convert(row, **keys).messages]
    assert said == ["S", "Hi\nthere", "Hello."]
    assert convert({"dialogue": PLAIN}, messages_key="dialogue").messages == PLAIN


@pytest.mark.parametrize(
    ("keys", "flag"),
    [
        ({"prompt_key": "x", "response_key": "a"}, "--prompt-key"),
        ({"prompt_key": "q", "response_key": "x"}, "--response-key"),
        ({"messages_key": "x"}, "--messages-key"),
        ({"prompt_key": "q", "response_key": "a", "system_key": "x"}, "--system-key"),
        ({"prompt_key": "q", "response_key": "a", "query_key": "x"}, "--query-key"),
    ],
)
def test_wrong_column_is_named_with_the_columns_there_are(keys, flag):
    with pytest.raises(RowError, match=f"no column 'x' \\({flag}\\); the row has q, a"):
        convert({"q": "Hi", "a": "Hello."}, **keys)


@pytest.mark.parametrize(
    ("row", "name", "keys", "flag"),
    [
        ({"messages": PLAIN}, "messages", {"prompt_key": "x"}, "--prompt-key x"),
        ({"m": PLAIN}, None, {"messages_key": "m", "response_key": "x"}, "--response-key x"),
        ({"conversations": PLAIN}, "sharegpt", {"query_key": "x"}, "--query-key x"),
        ({"question": "q", "answer": "a"}, "question", {"messages_key": "x"}, "--messages-key x"),
        ({"prompt": "q", "chosen": "a"}, "preference", {"response_key": "x"}, "--response-key x"),
        ({}, f"{__name__}:own_converter", {"system_key": "x"}, "--system-key x"),
    ],
)
def test_column_that_the_format_does_not_read_is_refused(row, name, keys, flag):
    with pytest.raises(DataError, match=f"{flag}: rows of the format .* takes (--|no column)"):
        convert(row, name, **keys)


def test_unknown_columns_are_listed():
    with pytest.raises(DataError, match="columns foo, bar.*--prompt-key"):
        detect_format({"foo": 1, "bar": 2}, FormatOptions())


def test_tool_conversations_of_every_origin_are_alike():
    openai = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"q": "x"}'}}
        ]},
        {"role": "tool", "content": "found", "tool_call_id": "1"},
        {"role": "assistant", "content": "Done."},
    ]  # fmt: skip
    sharegpt = [
        {"from": "human", "value": "Look."},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"q": "x"}}'},
        {"from": "observation", "value": "found"},
        {"from": "gpt", "value": "Done."},
    ]
    tools = '[{"name": "look", "parameters": {}}]'
    first = convert({"messages": openai, "tools": [{"name": "look", "parameters": {}}]})
    second = convert({"conversations": sharegpt, "tools": tools})
    for conversation in (first, second):
        assert conversation.messages[1]["tool_calls"][0]["function"] == CALL["function"]
        assert [m["role"] for m in conversation.messages] == [
            "user",
            "assistant",
            "tool",
            "assistant",
        ]
        assert conversation.tools == [
            {"type": "function", "function": {"name": "look", "parameters": {}}}
        ]


def test_typed_parts_and_reasoning_are_read():
    parts = [{"type": "reasoning", "value": "sum"}, {"type": "text", "text": "Four."}]
    message = convert({"messages": [USER, {"role": "assistant", "content": parts}]}).messages[1]
    assert message == {"role": "assistant", "content": "Four.", "reasoning_content": "sum"}
    for field in ("reasoning_content", "reasoning", "thinking"):
        row = {"messages": [USER, {**ASSISTANT, field: "sum"}]}
        assert convert(row).messages[1]["reasoning_content"] == "sum"


def test_keys_that_arrow_fills_with_nulls_disappear():
    nulls = {"tool_calls": None, "name": None, "reasoning_content": None, "weight": None}
    row = {"messages": [{**USER, **nulls}, {**ASSISTANT, **nulls}], "tools": None}
    assert convert(row).messages == PLAIN


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "text": "Hello."},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": None, "tool_calls": None, "reasoning_content": ""},
        {"role": "assistant"},
        {"role": "user", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": None},
        {"from": "gpt", "text": "Hello."},
    ],
)
def test_message_without_content_is_refused_with_its_keys(message):
    with pytest.raises(RowError, match=f"message 2 .*keys are {next(iter(message))}") as error:
        convert({"messages": [USER, message, ASSISTANT]}, "messages")
    assert error.value.reason == "no content"


def test_value_is_read_where_there_is_no_content():
    mixed = [{"role": "user", "value": "Hi"}, {"role": "assistant", "value": "Hello."}]
    assert convert({"messages": mixed}).messages == PLAIN
    nulls = {"role": None, "content": None}
    filled = [
        {**nulls, "from": "human", "value": "Hi"},
        {**nulls, "from": "gpt", "value": "Hello."},
    ]
    assert convert({"conversations": filled}).messages == PLAIN
    only = {"role": "assistant", "content": None}
    called = convert({"messages": [USER, {**only, "tool_calls": [CALL]}]}).messages[1]
    assert (called["content"], called["tool_calls"]) == ("", [CALL])
    for none in ("[]", "[ ]", "null", None):
        assert convert({"messages": [USER, {**ASSISTANT, "tool_calls": none}]}).messages == PLAIN
    thought = convert({"messages": [USER, {**only, "reasoning_content": "sum"}]}).messages[1]
    assert thought["reasoning_content"] == "sum"


@pytest.mark.parametrize(
    "field",
    [{"loss": False}, {"weight": 0}, {"weight": 0.0}, {"loss": True, "weight": 0},
     {"loss": False, "weight": 1}],
)  # fmt: skip
def test_messages_can_be_left_untrained(field):
    row = {"messages": [USER, {**ASSISTANT, **field}, USER, {**ASSISTANT, "weight": 1}]}
    assert convert(row).trained == [False, False, False, True]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("no list", "bad messages"),
        (7, "bad messages"),
        ([7], "bad messages"),
        ([], "no assistant turn"),
        ([USER], "no assistant turn"),
        ([{"role": "robot", "content": "x"}], "unknown role"),
        ([{"role": ["user"], "content": "x"}], "unknown role"),
        ([{"content": "x"}], "unknown role"),
        ([{"role": "user", "content": 7}], "bad content"),
        ([{"role": "user", "content": [7]}], "bad content"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "bad content"),
        ([{"from": "function_call", "value": "not json"}], "bad tool call"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "bad tool call"),
        ([{"role": "assistant", "tool_calls": 7}], "bad tool call"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], "bad tool call"),
        ([{"role": "assistant", "content": "x", "weight": 0.5}], "bad loss field"),
        ([{"role": "assistant", "content": "x", "thinking": 5}], "bad reasoning"),
    ],
)
def test_malformed_messages_are_refused_by_reason(messages, reason):
    with pytest.raises(RowError) as error:
        convert({"messages": messages}, "messages")
    assert error.value.reason == reason


def own_converter(row):
    return [{"role": "user", "content": row["in"]}, {"role": "assistant", "content": row["out"]}]


def failing_converter(row):
    raise KeyError("gone")


def test_user_converter_is_called_and_its_failures_are_reasons(monkeypatch):
    name = f"{__name__}:own_converter"
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("sys").modules[__name__])
    assert convert({"in": "Hi", "out": "Hello."}, name).messages == PLAIN
    with pytest.raises(RowError, match="failing_converter: KeyError"):
        convert({}, f"{__name__}:failing_converter")
    with pytest.raises(DataError, match="--conversation-format no.such:thing"):
        converter("no.such:thing", FormatOptions())
    with pytest.raises(DataError, match="known are messages"):
        converter("unknown", FormatOptions())


def masking_converter(row):
    return Conversation([dict(m) for m in row["m"]], None, row["trained"])


def test_mask_of_a_user_converter_is_kept_and_checked():
    name, four = f"{__name__}:masking_converter", [*PLAIN, *PLAIN]
    row = {"m": four, "trained": [False, False, False, True]}
    assert convert(row, name).trained == [False, False, False, True]
    assert convert({"m": four, "trained": []}, name).trained == [False, True, False, True]
    weighed = [*PLAIN, USER, {**ASSISTANT, "weight": 0}]
    assert convert({"m": weighed, "trained": []}, name).trained == [False, True, False, False]
    for trained, found in (
        ([True], "'trained' is 1, expected 4"),
        (True, "'trained' is bool"),
        ([True, True, True, True], "message 1 is of role user"),
        ([False, "no", False, True], "message 2 is 'no'"),
    ):
        with pytest.raises(RowError, match=f"bad mask: .*{found}"):
            convert({"m": four, "trained": trained}, name)


def test_named_datasets_use_formats_of_the_registry():
    assert len(NAMED_DATASETS) == 5
    assert all(named.format in FORMATS for named in NAMED_DATASETS.values())
    orca = NAMED_DATASETS["Open-Orca/OpenOrca"]
    row = {"system_prompt": "", "question": "Hi", "response": "Hello."}
    assert converter(orca.format, orca.options)(row).messages == PLAIN


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.sampled_from(
    ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type",
     "text", "user", "assistant", "loss", "weight", "thinking", "tools", "reasoning_content"]
)  # fmt: skip
anything = st.recursive(
    scalars | st.sampled_from(["user", "assistant", "gpt", "[]", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
columns = st.sampled_from(
    ["messages", "conversations", "tools", "instruction", "input", "output", "history", "chosen",
     "prompt", "question", "answer", "system"]
)  # fmt: skip


@given(st.dictionaries(columns, anything, max_size=5), st.sampled_from(list(FORMATS)))
def test_any_row_is_a_conversation_or_a_reason(row, name):
    try:
        conversation = convert(row, name)
    except RowError as error:
        assert error.reason
        assert error.detail
        return
    assert isinstance(conversation, Conversation)
    for message in conversation.messages:
        assert message["role"] in ("system", "user", "assistant", "tool")
        assert isinstance(message["content"], str)
    assert len(conversation.trained) == len(conversation.messages)


def test_nulls_in_json_are_the_data_s_own_and_those_that_arrow_fills_in_are_not():
    said = {"unit": None, "city": "Rome"}
    schema = {"name": "look", "parameters": {"default": None, "type": "object"}}

    def kept(arguments, tools):
        call = {"function": {"name": "look", "arguments": arguments}}
        asked = {"role": "user", "content": "Hi"}
        answer = {"role": "assistant", "content": "", "tool_calls": call}
        found = convert({"messages": [asked, answer], "tools": tools})
        return (
            found.messages[1]["tool_calls"][0]["function"]["arguments"],
            found.tools[0]["function"]["parameters"],
        )

    own = (said, schema["parameters"])
    assert kept(json.dumps(said), json.dumps([schema])) == own
    assert kept(json.dumps(said), [json.dumps(schema)]) == own
    assert kept(said, [schema]) == own
    calls = [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}
        for arguments in ({"n": [1, None], "of": {"city": "Rome"}}, {"unit": "K", "of": {"day": 1}})
    ]
    rows = Dataset.from_list([{"messages": [USER, call]} for call in calls])
    read = [raw.row for chunk in dataset_chunks(rows, "rows") for raw in read_chunk(chunk)]
    assert [row["messages"][1] for row in read] == calls
    assert read[0]["messages"][0] == USER
    whole = json.dumps({"name": "look", "arguments": said})
    rows = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": whole}]
    found = convert({"conversations": rows})
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == said


def test_a_tool_without_a_name_is_refused():
    nameless: list[dict] = [
        {},
        {"parameters": {}},
        {"type": "function", "function": {"title": "a"}},
    ]
    for tool in nameless:
        with pytest.raises(RowError, match="bad tools: tool 2 has no function name"):
            convert({"messages": [USER, ASSISTANT], "tools": [{"name": "look"}, tool]})


def test_a_converter_that_gives_text_is_named():
    convert = converter("json:dumps", FormatOptions())
    with pytest.raises(RowError, match="json:dumps gave str, expected a Conversation or a list"):
        convert({"messages": [{"role": "user", "content": "a"}]})
