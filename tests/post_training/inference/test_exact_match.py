"""Answers are compared, and those that were cut are told."""

import pytest

from data.rows.conversation import Conversation
from post_training.inference.backends import TransformersBackend
from post_training.inference.exact_match import Question, evaluate
from post_training.inference.generate import Sampling
from tests.helpers.models import load_model, make_tokenizer

TURNS = ["What is 2 + 2?", "Name a colour.", "Sort 3 1 2."]


@pytest.fixture
def backend(hf_model):
    """Answers with up to four tokens of a model that was not trained."""
    model = load_model(hf_model("qwen3")).eval()
    return TransformersBackend(model, make_tokenizer(), "here", Sampling(max_new_tokens=4), 2)


def questions(answers):
    return [
        Question(f"row {number}", Conversation([{"role": "user", "content": text}]), answer, "")
        for number, (text, answer) in enumerate(zip(TURNS, answers, strict=True))
    ]


def test_answers_that_reach_the_limit_are_counted(backend):
    tokenizer = backend.tokenizer
    prompts = [backend.prompts.encode_turns({"role": "user", "content": text}) for text in TURNS]
    whole = backend.generate(prompts)
    assert [len(answer) for answer in whole] == [4, 4, 4]
    scores = evaluate(backend, questions([tokenizer.decode(answer) for answer in whole]))
    assert scores.accuracy == 1.0 and scores.truncated == 3
    assert scores.table().endswith("\n3 of 3 answers reached --max-new-tokens 4")

    # The token that ends an answer may be the last one of those that are allowed.
    stop = whole[0][-1]
    length = whole[0].index(stop)
    backend.model.generation_config.eos_token_id = [stop]
    for longest, cut in ((length, True), (length + 1, False)):
        backend.sampling = Sampling(max_new_tokens=longest)
        scores = evaluate(backend, questions(["no"] * 3)[:1])
        assert scores.rows[0]["truncated"] is cut
        assert ("1 of 1 answers reached" in scores.table()) is cut
