"""All templates of the test data, with real tokenizers, against transformers' own mask."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from data.answer_spans import AnswerFinder, trained_spans
from data.chat_template import ChatTemplate
from data.conversation import Conversation
from data.errors import RowError
from data.reasoning import keep_reasoning
from data.template_survey import _SPECIAL, load_tokenizers, survey
from data.token_mask import token_mask
from data.tokenizer_facts import special_tokens

MESSAGES = [
    {"role": "user", "content": "Where is Lima?"},
    {"role": "assistant", "content": "In Peru."},
    {"role": "user", "content": "And Accra, is it “near”?"},
    {"role": "assistant", "content": "No: Ghana 👋🏽."},
]


def test_every_template_is_exact_or_refused_with_a_reason(test_data):
    tokenizers = load_tokenizers(test_data / "tokenizers")
    rows = [survey(p, tokenizers) for p in sorted(test_data.glob("chat_templates/*/*.jinja"))]
    assert len(rows) == 84
    unusable = {row.name: row.problem for row in rows if row.problem}
    # Needs a template variable that only its own server sets.
    assert list(unusable) == ["llama.cpp/fireworks-ai-llama-3-firefunction-v2"]
    assert "'functions' is undefined" in unusable.popitem()[1]
    verdicts = [result for row in rows if row.report for result in row.report.results]
    assert {result.verdict for result in verdicts} == {"exact", "refused"}
    assert all(result.detail for result in verdicts if result.verdict == "refused")
    assert sum(result.verdict == "exact" for result in verdicts) >= 850
    # A template is usable with each tokenizer that it fits.
    assert all(row.usable_with == row.fitting for row in rows if not row.problem)


def test_no_template_trains_an_empty_think_block(test_data):
    empty = "<think>\n\n</think>\n\n"
    rows = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}] * turns
        for said in (empty + "Hello.", "Hello.")
        for turns in (1, 2)
    ]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    trained = 0
    for path in sorted(test_data.glob("chat_templates/*/*.jinja")):
        source = keep_reasoning(path.read_text())[0]
        own = sorted({*_SPECIAL.findall(source), "<s>", "</s>"})
        finder = AnswerFinder(ChatTemplate(source, names), own)
        for messages in rows:
            conversation = Conversation(messages)
            for method in {finder.method, "marks"}:
                try:
                    rendering = finder.find(conversation, method)
                except RowError:
                    continue
                trained += 1
                for begin, end in trained_spans(rendering, conversation):
                    assert "think" not in rendering.text[begin:end].lower(), path.name
    assert trained > 400


def generation_templates(test_data):
    paths = sorted(test_data.glob("chat_templates/*/*.jinja"))
    return [path for path in paths if "endgeneration" in path.read_text()]


def parts(messages):
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def test_marks_agree_with_transformers_where_templates_mark_answers(test_data):
    tokenizer = AutoTokenizer.from_pretrained(test_data / "tokenizers/qwen3")
    paths = generation_templates(test_data)
    assert len(paths) == 27
    for path in paths:
        source = path.read_text()
        own = sorted(set(_SPECIAL.findall(source)))
        tokenizer.add_special_tokens({"additional_special_tokens": own})
        names = {"bos_token": "<s>", **special_tokens(tokenizer)}
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        finder = AnswerFinder(ChatTemplate(source, names), own, added)
        conversation = Conversation(MESSAGES)
        messages = parts(MESSAGES) if finder.forms.parts else MESSAGES
        theirs = tokenizer.apply_chat_template(
            messages,
            chat_template=source,
            return_dict=True,
            return_assistant_tokens_mask=True,
            bos_token=names["bos_token"],
        )
        mask_of = {}
        for method in ("generation", "marks"):
            rendering = finder.find(conversation, method)
            encoding = tokenizer.backend_tokenizer.encode(rendering.text, add_special_tokens=False)
            spans = [(turn.start, turn.end) for turn in rendering.turns]
            mask_of[method], crossing = token_mask(encoding, spans, rendering.text)
            assert encoding.ids == theirs["input_ids"], path.name
            assert crossing == 0, path.name
        ours, their_mask = mask_of["marks"], np.array(theirs["assistant_masks"])
        assert np.array_equal(mask_of["generation"], ours), path.name
        # Theirs may train more, but only what no answer needs: the header, an empty think block,
        # and what follows the stop. Everything else is the same token for token.
        assert not (ours & ~their_mask & 1).any(), path.name
        extra = [i for i, t, o in zip(encoding.ids, their_mask, ours, strict=True) if t and not o]
        left = tokenizer.decode(extra)
        for token in (*own, "<think>", "</think>", "assistant", names["eos_token"]):
            left = left.replace(token, "")
        assert not left.strip(), f"{path.name}: {left!r}"


@pytest.mark.parametrize(
    ("name", "drops"),
    [
        ("llama.cpp/deepseek-ai-DeepSeek-R1-Distill-Llama-8B", True),
        ("trl/qwen3", True),
        ("trl/phi3", False),
    ],
)
def test_templates_that_drop_reasoning_are_mended(test_data, name, drops):
    source = (test_data / f"chat_templates/{name}.jinja").read_text()
    kept, removed = keep_reasoning(source)
    assert bool(removed) == drops
    thought = "<think>\nsum\n</think>\n\nFour."
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": thought},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    assert ("sum" in ChatTemplate(source, names).render(messages)) != drops
    assert "sum" in ChatTemplate(kept, names).render(messages)
