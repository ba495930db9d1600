import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from data.rows.conversation import Conversation
from post_training.inference.backends import TransformersBackend
from post_training.inference.exact_match import Question, encode_questions, evaluate, read_questions
from post_training.inference.generate import Sampling
from scripts.quickstart import vision as quickstart
from tests.helpers import vision


def test_answers_to_pictures_are_those_of_the_model_without_cache_and_batch(tmp_path):
    folder = vision.save_model(tmp_path / "model", "qwen2_5_vl")
    for name, colour in (("a", "black"), ("b", "white")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{name}.png")
    questions = []
    for name, words in (
        ("a", "What is it?"),
        ("b", "What is it?"),
        ("", "And this?"),
        ("a", "Why?"),
    ):
        parts = [{"type": "image"}] * bool(name) + [{"type": "text", "text": words}]
        asked = Conversation([{"role": "user", "content": parts}], None, [False])
        asked.pictures = [f"{name}.png"] if name else []
        questions.append(Question("here", asked, "", "", None, str(tmp_path / "rows.jsonl")))
    backend = TransformersBackend.load(str(folder), Sampling(max_new_tokens=5), 8)
    prompts, seen = encode_questions(backend.prompts, questions, backend.images)
    assert len(prompts[0]) == len(prompts[1]) and prompts[0] == prompts[1]  # one batch
    answers = backend.generate(prompts, seen)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    for ids, fields, answer in zip(prompts, seen, answers, strict=True):
        row = torch.tensor([ids])
        for token in answer:
            kinds = (row == model.config.image_token_id).int()
            options = {**fields(), "mm_token_type_ids": kinds, "use_cache": False}
            with torch.no_grad():
                assert token == int(model(row, **options).logits[0, -1].argmax())
            row = torch.cat([row, torch.tensor([[token]])], dim=1)
    assert answers[0] != answers[1]  # of other pictures


def test_every_row_of_a_parquet_is_scored_by_its_choice(tmp_path):
    folder = vision.save_model(tmp_path / "model", "qwen2_5_vl")
    rows = quickstart.make_rows(0, 6, 0)[0]
    quickstart.write_parquet(tmp_path / "test-0.parquet", rows)
    questions = read_questions([str(tmp_path / "test-*.parquet")])
    assert [q.choices.right for q in questions if q.choices] == [r["correct_answer"] for r in rows]
    backend = TransformersBackend.load(str(folder), Sampling(max_new_tokens=2), 8)
    said = [questions[0].answer, "A", "B", "C", "D", "nothing"]
    backend.tokenizer = Decoder(backend.tokenizer, said)
    scores = evaluate(backend, questions)
    right = [True, *(r["correct_answer"] == i for i, r in enumerate(rows[1:5])), False]
    assert [row["correct"] for row in scores.rows] == right
    assert set(scores.by_kind()) == {row["kind"] for row in rows} | {""}


class Decoder:
    """A tokenizer that reads fixed answers out of whatever was generated."""

    def __init__(self, tokenizer, said):
        self.tokenizer, self.said = tokenizer, iter(said)

    def __call__(self, *args, **options):
        return self.tokenizer(*args, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, ids, **options):
        return next(self.said)
