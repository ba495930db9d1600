"""On real conversations: the trained tokens decode to exactly what the assistant said, and a stop."""

import json

import pytest
from transformers import AutoTokenizer

from data.formats import FormatOptions, converter, detect_format
from data.prepare import prepare_documents

TOKENIZERS = {
    "qwen3": "<|im_end|>",
    "minimind": "<|im_end|>",
    "mistral-7b-instruct": "</s>",
    "phi-3-mini": "<|end|>",
    "deepseek-r1-distill-qwen_assembled": "<｜end▁of▁sentence｜>",
}
SOURCES = {
    "gsm8k/test.jsonl": 200,
    "llamafactory/glaive_toolcall_en_demo.json": 100,
    "fastchat/dummy_conversation.json": 100,
    "llamafactory/reason_tool_use_demo_50.jsonl": 50,
    "modelopt/synthetic_conversations_1k.jsonl": 100,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def real(request, test_data):
    tokenizer = AutoTokenizer.from_pretrained(test_data / "tokenizers" / request.param)
    return request.param, tokenizer, TOKENIZERS[request.param]


def read_rows(path, count):
    text = path.read_text()
    rows = json.loads(text) if path.suffix == ".json" else list(map(json.loads, text.splitlines()))
    return rows[:count]


@pytest.mark.parametrize("source", SOURCES)
def test_trained_tokens_are_the_answers_and_their_stops(real, source, test_data, tmp_path):
    name, tokenizer, stop = real
    rows = read_rows(test_data / "conversations" / source, SOURCES[source])
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with_tools = "tool" in source
    if with_tools and name in ("mistral-7b-instruct", "phi-3-mini"):
        pytest.skip("this template has no tools")
    documents = prepare_documents(
        files=[str(data)],
        tokenizer=tokenizer,
        seq_length=32768,
        cache_dir=None,
        on_bad_row="skip",
    )
    report = documents.report
    assert report["read"] == len(rows) == report["kept"] + sum(report["dropped"].values())
    assert report["boundary_tokens"] == 0
    options = FormatOptions()
    convert = converter(detect_format(rows[0], options), options)
    # Mistral's template wants alternating roles; DeepSeek's ends no call with a stop.
    assert len(documents) == len(rows) or "qwen3" != name != "minimind"
    for index in range(len(documents)):
        ids, mask = documents[index]
        row = rows[documents.provenance[index, 1]]
        rest = tokenizer.decode(ids[mask == 1], clean_up_tokenization_spaces=False)
        for message in convert(row).messages:
            if message["role"] != "assistant":
                continue
            turn, found, rest = rest.partition(stop)
            assert found, "every turn ends with its stop"
            content, reasoning = message["content"], message.get("reasoning_content")
            if reasoning:
                assert reasoning.strip() in turn
            if message.get("tool_calls"):
                for call in message["tool_calls"]:
                    assert call["function"]["name"] in turn
                    for value in call["function"]["arguments"].values():
                        text = json.dumps(value, ensure_ascii=False)
                        assert not isinstance(value, str) or text in turn
            elif not reasoning:
                assert turn.strip() == content.strip()
        assert not rest.strip(), f"nothing else is trained: {rest!r}"
