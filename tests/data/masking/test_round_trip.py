"""On real conversations: the trained tokens decode to exactly what the assistant said, and a stop.

What the assistant said is read from the rows here, by code of this test, and written down the way
each template frames it. Every row is either kept and exact, or refused for a reason named here.
"""

import functools
import json
import re
from dataclasses import dataclass, field

import numpy as np
import pytest
from transformers import AutoTokenizer

from data.errors import DataError
from data.prepare.prepare import prepare_documents

GSM8K = "gsm8k/test.jsonl", 200
GLAIVE = "llamafactory/glaive_toolcall_en_demo.json", 100
SHAREGPT = "fastchat/dummy_conversation.json", 100
REASONING = "llamafactory/reason_tool_use_demo_50.jsonl", 50
MESSAGES = "modelopt/synthetic_conversations_1k.jsonl", 100


@dataclass
class Said:
    """One assistant message as the row has it."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)  # name, arguments as JSON

    def call(self, text):
        value = json.loads(text)
        arguments = json.dumps(value["arguments"], ensure_ascii=False)
        self.calls.append((value["name"], arguments))
        return self


def said_in(row):
    """What the assistant says in a row of any of the sources, message by message."""
    if "answer" in row:
        return [Said(row["answer"])]
    said = []
    for message in row.get("messages") or row["conversations"]:
        who = message.get("from") or message["role"]
        if who == "function_call":
            said.append(Said().call(message["value"]))
        elif who == "gpt":
            said.append(Said(message["value"]))
        elif who == "assistant" and isinstance(message["content"], str):
            said.append(Said(message["content"]))
        elif who == "assistant":
            said.append(Said())
            for part in message["content"]:
                if part["type"] == "tool_call":
                    said[-1].call(part["value"])
                elif part["type"] == "reasoning":
                    said[-1].reasoning += part["value"]
                else:
                    said[-1].content += part["value"]
    return said


def thought(said):
    """Reasoning and content, for templates that take both as text."""
    before = f"<think>\n{said.reasoning}\n</think>\n\n" if said.reasoning else ""
    return before + said.content


def qwen(said):
    calls = [
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in said.calls
    ]
    between = "\n" if said.content and calls else ""
    return thought(said) + between + "\n".join(calls) + "<|im_end|>"


def plain(stop):
    """A template without tool calls."""
    return lambda said: thought(said) + stop


def nemo(said):
    calls = [f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in said.calls]
    return (f"[TOOL_CALLS][{', '.join(calls)}]" if calls else said.content) + "</s>"


def apriel(said):
    calls = [f'{{"name": "{name}", "arguments": {arguments}}}' for name, arguments in said.calls]
    framed = f"\n<tool_calls>[{', '.join(calls)}]</tool_calls>" if calls else ""
    return thought(said) + framed + "\n<|end|>"


def deepseek(said):
    calls = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"
        for name, arguments in said.calls
    )
    framed = f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>" if calls else ""
    return said.content + framed + "<｜end▁of▁sentence｜>"


MISTRAL, PHI, R1 = "mistral-7b-instruct", "phi-3-mini", "deepseek-r1-distill-qwen_assembled"
NEMO = "llama.cpp/mistralai-Mistral-Nemo-Instruct-2407"
SMALL = "llama.cpp/Mistral-Small-3.2-24B-Instruct-2506"
APRIEL, V31 = "llama.cpp/unsloth-Apriel-1.5", "llama.cpp/deepseek-ai-DeepSeek-V3.1"
ALL, TEXT = [GSM8K, GLAIVE, SHAREGPT, REASONING, MESSAGES], [GSM8K, SHAREGPT, MESSAGES]
to_mistral, to_phi, to_r1 = plain("</s>"), plain("<|end|>"), plain("<｜end▁of▁sentence｜>")
NO_TOOLS = (
    r"answer dropped: the template leaves out a tool call of message \d+: '.*'; --chat-template"
)
ALTERNATE = r"template refused: Conversation roles must alternate .* \(the row .*; --chat-template"
# Tokenizer, template (None: its own), framing, source, rows kept, why the others are refused, and how
# many answers begin with white space that a token of the header takes.
CASES = [
    *[("qwen3", None, qwen, source, source[1], "", 0) for source in ALL],
    *[("minimind", None, qwen, source, source[1], "", 0) for source in ALL],
    *[(MISTRAL, None, to_mistral, source, source[1], "", 0) for source in TEXT],
    # Its own template has neither tools nor a system prompt; "]{" would be one token.
    (MISTRAL, None, to_mistral, GLAIVE, 47, ALTERNATE, 0),
    (MISTRAL, None, to_mistral, REASONING, 0, ALTERNATE, 0),
    # This tokenizer is older than these templates: "][" of [/INST][TOOL_CALLS] is one token.
    (MISTRAL, NEMO, nemo, GLAIVE, 100, "", 0),
    # No template of Mistral writes text, so no reasoning, beside a call; "]<" is one token.
    (MISTRAL, SMALL, to_mistral, REASONING, 19, "reasoning dropped: the template leaves out", 0),
    *[(PHI, None, to_phi, source, source[1], "", 0) for source in TEXT],
    (PHI, None, to_phi, GLAIVE, 47, NO_TOOLS, 0),
    (PHI, None, to_phi, REASONING, 19, NO_TOOLS, 0),
    # The line break before a call belongs to <|assistant|>, which swallows all white space after it.
    (PHI, APRIEL, apriel, GLAIVE, 100, "", 73),
    (PHI, APRIEL, apriel, REASONING, 50, "", 0),
    *[(R1, None, to_r1, source, source[1], "", 0) for source in TEXT],
    # Its own template ends a call without a stop, and drops calls beside text.
    (R1, None, to_r1, GLAIVE, 47, "no stop: after the tool call of message", 0),
    (R1, None, to_r1, REASONING, 19, NO_TOOLS, 0),
    # Think tags are no tokens of this tokenizer: '>"' is one.
    (R1, V31, deepseek, GLAIVE, 100, "", 0),
]


@functools.cache
def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(folder)


def read_rows(path, count):
    text = path.read_text()
    rows = json.loads(text) if path.suffix == ".json" else list(map(json.loads, text.splitlines()))
    return rows[:count]


def trained_texts(tokenizer, ids, mask):
    """For each run of trained tokens the text of the token before it, and its own."""
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).reshape(-1, 2)
    return [
        (decoded(tokenizer, ids[a - 1 : a]), without_ids(decoded(tokenizer, ids[a:b])))
        for a, b in edges.tolist()
    ]


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def without_ids(text):
    """A trained text without the ids that were made up for calls without one."""
    return re.sub(r', "id": "[0-9a-f]{9}"', "", text)


@pytest.mark.parametrize(
    ("name", "template", "framing", "source", "kept", "refusal", "inside"), CASES
)
def test_trained_tokens_are_the_answers_and_their_stops(
    name, template, framing, source, kept, refusal, inside, test_data, tmp_path
):
    tokenizer = tokenizer_of(test_data / "tokenizers" / name)
    rows = read_rows(test_data / "conversations" / source[0], source[1])
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "tokenizer": tokenizer,
        "seq_length": 32768,
        "cache_dir": tmp_path / "cache",
        "on_bad_row": "skip",
        "chat_template": template and str(test_data / f"chat_templates/{template}.jinja"),
    }
    if not kept:
        with pytest.raises(DataError, match=rf"no row can be trained; {len(rows)} read"):
            prepare_documents(files=[str(data)], **options)
        options["on_bad_row"] = "error"
        with pytest.raises(DataError, match=refusal):
            prepare_documents(files=[str(data)], **options)
        return
    documents = prepare_documents(files=[str(data)], **options)
    report = documents.report
    assert (report["read"], report["kept"]) == (len(rows), kept)
    assert report["boundary_tokens"] == inside
    refused = (tmp_path / "cache" / documents.fingerprint / "bad_rows.jsonl").read_text()
    reasons = [json.loads(line) for line in refused.splitlines()]
    assert len(reasons) == len(rows) - kept
    for place, reason, detail in reasons:
        assert re.match(refusal, f"{reason}: {detail}", re.DOTALL), (place, reason, detail)
    begun_inside = 0
    for index in range(len(documents)):
        ids, mask = documents[index]
        said = said_in(rows[documents.provenance[index, 1]])
        trained = trained_texts(tokenizer, ids, mask)
        for (before, text), expected in zip(trained, map(framing, said), strict=True):
            if text != expected:
                # All but what the prompt has at inference: an opened tag, or white space that the
                # token before takes.
                assert expected.endswith(text)
                first = expected.removesuffix(text)
                taken = first == "\n" and before == "<|assistant|>"
                assert taken or first == "<think>\n"
                begun_inside += taken
    assert begun_inside == inside
