import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.errors import RowError
from data.masking.answers import AnswerFinder, trained_spans
from data.rows.conversation import Conversation
from data.templates.marks import MARKS
from data.templates.reasoning import keep_reasoning
from data.templates.template import ChatTemplate
from tests.data.conftest import CHATML
from tests.helpers.templates import GENERATION, THINKING, chat, finder

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' "
    "[/INST]' }}{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)


def trained(source, conversation, method=None, **policy):
    found = finder(source, reasoning=policy.get("reasoning", "keep"))
    rendering = found.find(conversation, method)
    return [rendering.text[a:b] for a, b in trained_spans(rendering, conversation, **policy)]


@pytest.mark.parametrize("source", [CHATML, THINKING, GENERATION])
def test_trained_text_is_the_answers_and_their_stops(source):
    conversation = chat("Hi", "Hello.", "And?", "Bye.")
    assert trained(source, conversation) == ["Hello.<|im_end|>", "Bye.<|im_end|>"]


def test_both_methods_agree_where_the_template_marks_answers():
    conversation = chat("Hi", "Hello.", "And?", "")
    assert trained(GENERATION, conversation, "generation") == trained(
        GENERATION, conversation, "marks"
    )


def test_header_ends_where_the_generation_prompt_ends():
    # The prompt of Llama 2 ends with [/INST]; the space is the model's to write.
    assert trained(LLAMA2, chat("Hi", "Hello.", "And?", "Bye.")) == [" Hello. </s>", " Bye. </s>"]


def test_stop_outside_the_generation_block_is_trained():
    inside = "{%- generation %}{{ message.content + '<|im_end|>\\n' }}{% endgeneration %}"
    outside = "{%- generation %}{{ message.content }}{% endgeneration %}{{ '<|im_end|>\\n' }}"
    assert inside in GENERATION
    source = GENERATION.replace(inside, outside)
    assert trained(source, chat("Hi", "Hello.")) == ["Hello.<|im_end|>"]


def test_loss_on_last_trains_one_turn():
    conversation = chat("Hi", "Hello.", "And?", "Bye.")
    assert trained(CHATML, conversation, loss_on="last") == ["Bye.<|im_end|>"]


def test_the_last_turn_is_all_that_the_assistant_says_after_the_last_question():
    thought = "<think>\nsum\n</think>\n\n"
    conversation = chat("Hi", thought + "Hello.", "And?", thought + "I look.")
    more = [{"role": "tool", "content": "found"}, {"role": "assistant", "content": thought + "So."}]
    conversation = Conversation([*conversation.messages, *more])
    source, _ = keep_reasoning(THINKING)
    calls = [thought + "I look.<|im_end|>", thought + "So.<|im_end|>"]
    assert trained(source, conversation, loss_on="last") == calls
    assert trained(source, conversation, reasoning="last") == ["Hello.<|im_end|>", *calls]
    # A question without an answer is no turn.
    asked = Conversation([*conversation.messages, {"role": "user", "content": "More?"}])
    assert trained(source, asked, loss_on="last") == calls
    # A template may leave out what is not trained, and nothing of the last turn.
    source = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + (m.content if loop.last or "
        "m.role != 'assistant' else m.content.split('</think>')[-1].lstrip('\\n')) + '<|im_end|>\\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    with pytest.raises(RowError, match="reasoning of message 4"):
        trained(source, conversation, reasoning="last")


def test_messages_that_the_row_does_not_train_are_left_out():
    conversation = chat("Hi", "Hello.", "And?", "Bye.")
    conversation.trained = [False, False, False, True]
    assert trained(CHATML, conversation) == ["Bye.<|im_end|>"]


def test_empty_think_block_that_the_template_adds_is_not_trained():
    found = finder(THINKING)
    rendering = found.find(chat("Hi", "Hello."))
    assert "<think>\n\n</think>" in rendering.text
    assert trained(THINKING, chat("Hi", "Hello.")) == ["Hello.<|im_end|>"]


EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("policy", ["keep", "last", "mask"])
@pytest.mark.parametrize("before", ["", "<think></think>", "<|channel|>final"])
@pytest.mark.parametrize("method", ["marks", "generation"])
def test_empty_think_blocks_of_the_data_are_not_trained(before, method, policy):
    source = GENERATION.replace("message.content +", f"'{before}' + message.content +")
    if method == "marks":
        source = source.replace("{%- generation %}", "{%- if 1 %}").replace(
            "endgeneration", "endif"
        )
    conversation = chat("Hi", EMPTY + "Hello.", "And?", EMPTY + "Bye.")
    spans = trained(source, conversation, reasoning=policy)
    # What the template writes before the block may be trained.
    assert [span for span in spans if span != before] == ["Hello.<|im_end|>", "Bye.<|im_end|>"]


def test_empty_think_block_between_two_texts_is_left_out():
    conversation = chat("Hi", "Hello.\n" + EMPTY + "Bye.")
    assert trained(CHATML, conversation) == ["Hello.\n", "Bye.<|im_end|>"]


@pytest.mark.parametrize("empty", ["", EMPTY])
def test_think_tag_that_the_template_opens_and_nobody_closes_is_not_trained(empty):
    source = CHATML.replace(
        "message.content", "('<think>\\n' if message.role == 'assistant' else '') + message.content"
    )
    assert "assistant\n<think>\n" in finder(source).find(chat("Hi", "Hello.")).text
    conversation = chat("Hi", empty + "Hello.")
    assert trained(source, conversation) == ["Hello.<|im_end|>"]


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "Four.", "reasoning_content": "2 + 2"},
        {"content": "<think>\n2 + 2\n</think>\n\nFour."},
    ],
)
@pytest.mark.parametrize(
    ("policy", "expected"),
    [("keep", "<think>\n2 + 2\n</think>\n\nFour.<|im_end|>"), ("mask", "Four.<|im_end|>")],
)
def test_reasoning_in_a_field_and_in_content_are_alike(answer, policy, expected):
    conversation = chat("2 + 2?", "", **answer)
    assert trained(THINKING, conversation, reasoning=policy) == [expected]


def test_reasoning_of_earlier_turns_is_refused_where_the_template_drops_it():
    conversation = chat("2 + 2?", "<think>\nsum\n</think>\n\nFour.", "Sure?", "Yes.")
    with pytest.raises(RowError, match="reasoning of message 2"):
        trained(THINKING, conversation)
    # Trained nowhere but in the last turn, it may be dropped.
    assert trained(THINKING, conversation, reasoning="last")[0] == "Four.<|im_end|>"


def test_kept_template_trains_reasoning_everywhere_or_in_the_last_turn():
    source, removed = keep_reasoning(THINKING)
    assert removed == 1
    thought = "<think>\nsum\n</think>\n\nFour."
    conversation = chat("2 + 2?", thought, "Sure?", thought)
    assert trained(source, conversation) == [thought + "<|im_end|>"] * 2
    assert trained(source, conversation, reasoning="last") == [
        "Four.<|im_end|>",
        thought + "<|im_end|>",
    ]


def test_tool_calls_are_trained_and_results_are_not():
    call = {"type": "function", "function": {"name": "look", "arguments": {"q": 'a "b" <c>'}}}
    conversation = Conversation(
        [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "found"},
            {"role": "assistant", "content": "Done."},
        ]
    )
    assert trained(keep_reasoning(THINKING)[0], conversation) == [
        '\n<tool_call>\nlook {"q": "a \\"b\\" <c>"}\n</tool_call><|im_end|>',
        "Done.<|im_end|>",
    ]


@pytest.mark.parametrize("source", [CHATML, GENERATION])
def test_answer_that_the_template_leaves_out_is_refused(source):
    conversation = chat("Look.", "Wait.", tool_calls=[
        {"type": "function", "function": {"name": "look", "arguments": {}}}])  # fmt: skip
    with pytest.raises(RowError, match="leaves out a tool call of message 2.*--chat-template FILE"):
        trained(source, conversation)


@pytest.mark.parametrize("source", [CHATML, GENERATION])
@pytest.mark.parametrize("role", ["system", "user"])
def test_question_or_system_prompt_that_the_template_leaves_out_is_refused(source, role):
    # As Mistral's templates do, which write the system prompt before a last question only.
    source = source.replace("in messages %}", "in messages if message.role != role_to_drop %}")
    source = f"{{%- set role_to_drop = '{role}' %}}" + source
    conversation = Conversation(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi there"},
            {"role": "assistant", "content": "Hello."},
        ]
    )
    found = finder(source)
    with pytest.raises(RowError, match=rf"question dropped: .*\({role}\) says"):
        found.find(conversation)


@pytest.mark.parametrize("source", [CHATML, GENERATION])
@pytest.mark.parametrize("said", ["Say <|im_end|> now.", "Hello.<|im_end|>"])
def test_stop_token_inside_an_answer_is_refused(source, said):
    with pytest.raises(RowError, match=r"stop token in text: message 4 .*<\|im_end\|>"):
        finder(source).find(chat("Hi", "Hello.", "And?", said))
    # Neither what a user says nor an answer that is not trained teaches it.
    assert trained(source, chat(said, "Hello.")) == ["Hello.<|im_end|>"]
    untrained = chat("Hi", said, "And?", "Bye.")
    untrained.trained = [False, False, False, True]
    assert trained(source, untrained) == ["Bye.<|im_end|>"]


def test_stop_token_inside_reasoning_or_a_tool_call_is_refused():
    call = {"type": "function", "function": {"name": "look", "arguments": {"q": "<|im_end|>"}}}
    for more in ({"tool_calls": [call]}, {"reasoning_content": "a <|im_end|> b"}):
        with pytest.raises(RowError, match="stop token in text: message 2"):
            trained(THINKING, chat("Hi", "Hello.", **more))


def test_template_that_counts_characters_is_refused():
    source = CHATML.replace(
        "message.content +", "message.content + message.content|length|string +"
    )
    with pytest.raises(RowError, match="marks change the text"):
        trained(source, chat("Hi", "Hello."))


def test_template_that_moves_answers_is_refused():
    source = CHATML.replace("message in messages", "message in messages[::-1]")
    with pytest.raises(RowError):
        trained(source, chat("Hi", "One.", "And?", "Two."))


def test_reserved_characters_in_the_text_are_refused():
    with pytest.raises(RowError, match="U\\+FDD0"):
        trained(CHATML, chat("Hi", "a" + MARKS[0]))


words = st.text(st.characters(codec="utf-8", exclude_characters=MARKS), max_size=12)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.booleans())
@example([("", "</think>")], False)
def test_any_text_gives_exactly_the_answers(turns, generation):
    source = GENERATION if generation else CHATML
    conversation = chat(*(text for pair in turns for text in pair))
    spans = trained(source, conversation)
    assert len(spans) == len(turns)
    for span, (_, answer) in zip(spans, turns, strict=True):
        if "<think>" not in answer:
            assert span.strip() == (answer + "<|im_end|>").strip()


@pytest.mark.parametrize(
    "said",
    ["Use the </think> tag to close it.", "Write <think> and </think> tags.",
     "<think>\nstill thinking", "<think>\nsum\n</think>\n\nSo <think>\nagain"],
)  # fmt: skip
def test_text_beside_a_tag_without_its_other_half_is_no_matter_for_a_policy(said):
    conversation = chat("How?", said)
    assert trained(CHATML, conversation) == [said + "<|im_end|>"]
    if not said.startswith("<think>"):
        with pytest.raises(RowError, match="marks lost"):  # this template cuts at the tag
            trained(THINKING, conversation)
    for source in (CHATML, THINKING):
        for policy in ("mask", "last"):
            with pytest.raises(RowError, match="stray think tag"):
                trained(source, conversation, reasoning=policy)


@pytest.mark.parametrize("policy", ["keep", "last", "mask"])
def test_raw_answers_to_a_prompt_that_opens_the_tag_are_reasoning_and_answer(policy):
    prompt = "'<|im_start|>assistant\\n'"
    source = CHATML.replace(prompt, prompt.replace("\\n'", "\\n<think>\\n'"))
    assert source != CHATML
    found = finder(source, reasoning=policy)
    raw, whole = "Sum.\n</think>\n\nFour.", "<think>\nSum.\n</think>\n\nFour."
    texts = []
    for said in (raw, whole):
        conversation = chat("2 + 2?", said)
        rendering = found.find(conversation)
        # What inference would have shown and heard: the prompt, then the raw answer.
        shown = found.template.render(conversation.messages[:1], add_generation_prompt=True)
        assert rendering.text == shown + raw + "<|im_end|>\n"
        spans = trained_spans(rendering, conversation, policy)
        texts.append([rendering.text[a:b] for a, b in spans])
    # The tag is in the prompt, so it is not for the model to write.
    expected = "Four.<|im_end|>" if policy == "mask" else raw + "<|im_end|>"
    assert texts == [[expected]] * 2
    # Tags that are talked about are left alone where there are both, or two.
    talk = chat("How?", "Write <think> and </think>.")
    assert "<think>\nWrite" not in finder(source).find(talk).text


# As gpt-oss writes: reasoning and answer in messages of their own, the callee's name before its result.
CHANNELS = """\
{%- set ns = namespace(callee='') %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- if m.reasoning %}{{ '<|start|>assistant/think ' + m.reasoning + '<|end|>' }}{% endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '<|start|>assistant to=' + call.function.name + ' ' }}
            {{- call.function.arguments|tojson + '<|call|>' }}
            {%- set ns.callee = call.function.name %}
        {%- endfor %}
        {%- if m.content %}{{ '<|start|>assistant/final ' + m.content + '<|end|>' }}{% endif %}
    {%- elif m.role == 'tool' %}{{ '<|start|>' + ns.callee + ' ' + m.content + '<|end|>' }}
    {%- else %}{{ '<|start|>' + m.role + ' ' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""


def channels(source=CHANNELS, **options):
    tokens = ["<|start|>", "<|end|>", "<|call|>"]
    return AnswerFinder(ChatTemplate(source, {}), tokens, **options)


def sums(arguments, **first):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return Conversation(
        [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "", "tool_calls": [call], **first},
            {"role": "tool", "content": "4", "name": "add"},
            {"role": "assistant", "content": "Four.", "reasoning_content": "It says 4."},
        ]
    )


@pytest.mark.parametrize("policy", ["keep", "mask"])
def test_calls_with_numbers_alone_are_told_where_the_template_repeats_their_name(policy):
    found = channels(reasoning=policy)
    conversation = sums({"a": 2, "b": 2}, reasoning_content="Add them.")
    rendering = found.find(conversation)
    spans = trained_spans(rendering, conversation, policy)
    call, final = '<|start|>assistant to=add {"a": 2, "b": 2}<|call|>', "/final Four.<|end|>"
    expected = {
        # Whom it calls and where it answers is the model's to write, whatever comes of reasoning.
        "keep": [
            "/think Add them.<|end|>" + call,
            "/think It says 4.<|end|><|start|>assistant" + final,
        ],
        "mask": [call, "<|start|>assistant" + final],
    }
    assert [rendering.text[a:b] for a, b in spans] == expected[policy]


@pytest.mark.parametrize("thought", [{}, {"reasoning_content": "Now."}])
def test_calls_without_arguments_are_refused_where_the_template_repeats_their_name(thought):
    with pytest.raises(RowError, match="marks lost: .*repeats"):
        channels().find(sums({}, **thought))
    once = CHANNELS.replace("ns.callee + ' '", "'tool '")
    conversation = sums({}, **thought)
    rendering = channels(once).find(conversation)
    assert rendering.text[rendering.turns[0].start : rendering.turns[0].end].endswith(
        "add {}<|call|>"
    )


@pytest.mark.parametrize("arguments", [{"a": 2}, {"a": "two"}, {"a": ""}])
def test_calls_that_the_template_writes_before_the_reasoning_are_refused(arguments):
    thought = CHANNELS[CHANNELS.index("        {%- if m.reasoning") :]
    thought = thought[: thought.index("\n") + 1]
    late = CHANNELS.replace(thought, "").replace(
        "        {%- if m.content", thought + "        {%- if m.content"
    )
    with pytest.raises(RowError, match="marks lost"):
        channels(late).find(sums(arguments, reasoning_content="Add them."))
    assert len(channels().find(sums(arguments, reasoning_content="Add them.")).turns) == 2


def test_reasoning_and_answer_in_adjoining_blocks_are_masked_as_marks_do():
    source = """\
{%- for m in messages %}
    {%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}
        {%- if m.reasoning_content %}
            {%- generation %}{{ '<|think|>' + m.reasoning_content + '<|/think|>' }}{% endgeneration %}
        {%- endif %}
        {%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
    tokens = ["<|im_start|>", "<|im_end|>", "<|think|>", "<|/think|>"]
    found = AnswerFinder(ChatTemplate(source, {}), tokens, reasoning="mask")
    conversation = chat("2 + 2?", "Four.", reasoning_content="Sum.")
    for method in ("generation", "marks"):
        rendering = found.find(conversation, method)
        spans = trained_spans(rendering, conversation, "mask")
        assert [rendering.text[a:b] for a, b in spans] == ["Four.<|im_end|>"], method
