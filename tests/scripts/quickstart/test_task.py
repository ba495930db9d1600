"""The quickstart's task: reproducible, disjoint, balanced, and readable by plain transformers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from post_training.export.readers import complaints
from scripts.quickstart import kinds as quickstart_kinds
from scripts.quickstart import task as quickstart_task
from scripts.quickstart.base_model import END_OF_TEXT, TURN_END, TURN_START
from scripts.quickstart.conversations import KINDS
from scripts.quickstart.rows import TEST_ROWS, TRAIN_ROWS, make_rows
from tests.helpers.launch import ROOT


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("task")
    quickstart_task.main(["--out", str(out)])
    return out


def test_same_seed_gives_the_same_bytes(task: Path, tmp_path: Path) -> None:
    quickstart_task.main(["--out", str(tmp_path)])
    assert _files(tmp_path) == _files(task)


def test_another_seed_gives_other_rows() -> None:
    assert make_rows(1) != make_rows(0)


def test_rows_are_well_formed_and_balanced(task: Path) -> None:
    train, test = _read(task / "train.jsonl"), _read(task / "test.jsonl")
    assert len(test) == TEST_ROWS == 500
    assert len(train) == TRAIN_ROWS
    for rows in (train, test):
        counts = Counter(row["kind"] for row in rows)
        assert set(counts) == set(KINDS)
        assert max(counts.values()) - min(counts.values()) <= 1
        for row in rows:
            roles = [message["role"] for message in row["messages"]]
            if roles[0] == "system":
                roles = roles[1:]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert all(m["content"] == m["content"].strip() != "" for m in row["messages"])
    assert any(row["messages"][0]["role"] == "system" for row in test)
    assert any(sum(m["role"] == "user" for m in row["messages"]) > 1 for row in test)


def test_held_out_questions_are_new_and_have_one_answer(task: Path) -> None:
    def question(row: dict) -> str:
        return json.dumps(row["messages"][:-1])

    train, test = _read(task / "train.jsonl"), _read(task / "test.jsonl")
    asked = set()
    for row in train:
        # A held-out question must not stand at the start of a longer training conversation.
        for end, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                asked.add(json.dumps(row["messages"][:end]))
    assert not asked & {question(row) for row in test}

    answers: dict[str, set[str]] = {}
    for row in train + test:
        answers.setdefault(question(row), set()).add(row["messages"][-1]["content"])
    assert all(len(found) == 1 for found in answers.values())


def test_conversations_fit_a_pack_and_special_tokens_stay_out(task: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(task / "base")
    special = {
        tokenizer.convert_tokens_to_ids(token)
        for token in (
            TURN_START,
            TURN_END,
            END_OF_TEXT,
        )
    }
    assert len(special) == 3 and tokenizer.eos_token == TURN_END
    assert tokenizer.pad_token == END_OF_TEXT
    seq_length = yaml.safe_load((ROOT / "scripts/quickstart/train.yaml").read_text())["seq_length"]
    for row in _read(task / "train.jsonl")[:500] + _read(task / "test.jsonl"):
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        assert len(ids) < seq_length
        assert tokenizer.pad_token_id not in ids
        for message in row["messages"]:
            plain = tokenizer(message["content"])["input_ids"]
            assert not special & set(plain)
            assert tokenizer.decode(plain) == message["content"]


def test_other_readers_have_nothing_to_complain_of(task: Path) -> None:
    assert complaints(task / "base") == []


def test_generation_prompt_is_a_prefix_of_the_whole(task: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(task / "base")
    for row in _read(task / "test.jsonl")[:50]:
        messages = row["messages"]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        answer = messages[-1]["content"] + TURN_END + "\n"
        assert whole == prompt + answer


def test_base_model_is_small_divisible_float32_and_knows_nothing(task: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(task / "base")
    model = AutoModelForCausalLM.from_pretrained(task / "base").eval()
    config = model.config
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert len(tokenizer) <= config.vocab_size
    for number in (
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
    ):
        assert number % 2 == 0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000

    right = 0
    rows = _read(task / "test.jsonl")[:100]
    with torch.no_grad():
        for row in rows:
            ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
            start = len(
                tokenizer.apply_chat_template(
                    row["messages"][:-1], add_generation_prompt=True, return_dict=False
                )
            )
            # Greedy decoding gives the answer exactly when every answer token, the stop token
            # included, is the most likely one after the right tokens before it.
            best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
            right += best[start - 1 : len(ids) - 2] == ids[start : len(ids) - 1]
    assert right < 5


def test_out_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quickstart_task.main([])
    assert "--out DIR" in capsys.readouterr().err


def test_two_kinds_are_kept_back(task: Path) -> None:
    quickstart_kinds.main(["--data", str(task / "train.jsonl")])
    every, ten, two = (_read(task / f"{name}.jsonl") for name in ("train", "ten", "two"))
    taught = [row for row in every if row["kind"] in quickstart_kinds.KEPT_BACK]
    assert len(taught) + len(ten) == len(every) and {r["kind"] for r in ten} == KINDS.keys() - {
        *quickstart_kinds.KEPT_BACK
    }
    assert two[: len(taught)] == taught and two[len(taught) :] == ten[: len(taught) // 2]
