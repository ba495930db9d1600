"""The survey of all templates of the test data, with real tokenizers, against transformers' own mask."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.template_survey import load_tokenizers, summary, survey, table
from data.tokenise.masked_tokenizer import MaskedTokenizer


@pytest.fixture(scope="module")
def templates(test_data):
    return sorted(test_data.glob("chat_templates/*/*.jinja"))


@pytest.mark.slow
def test_every_template_is_exact_or_refused_and_the_table_says_so(test_data, templates):
    """All templates, probes and fitting tokenizers, token by token, against two other masks."""
    tokenizers = load_tokenizers(test_data / "tokenizers", templates)
    rows = [survey(path, tokenizers) for path in templates]
    assert len(rows) == 84
    unusable = {row.name: row.problem for row in rows if row.problem}
    # Needs a template variable that only its own server sets.
    assert list(unusable) == ["llama.cpp/fireworks-ai-llama-3-firefunction-v2"]
    assert "'functions' is undefined" in unusable.popitem()[1]
    assert sum(row.method == "generation" for row in rows) == 27
    require_exact(rows)
    committed = (Path(__file__).parents[2] / "docs/templates.md").read_text(encoding="utf-8")
    assert summary(rows) in committed, "run benchmarks/template_survey.py again"
    assert table(rows) in committed, "run benchmarks/template_survey.py again"


@pytest.fixture(scope="module")
def few(test_data, templates):
    return load_tokenizers(test_data / "tokenizers", templates, ("qwen3",))


def test_some_templates_are_exact_or_refused(few, templates):
    rows = [survey(path, few) for path in templates[5::13]]
    require_exact(rows)
    assert {tried.tokenizer for row in rows for tried in row.tried} == {"qwen3", "its own tokens"}
    assert {row.method for row in rows} == {"generation", "marks"}


def require_exact(rows):
    for row in rows:
        for tried in row.tried:
            assert tried.verdict == "exact" or (tried.verdict == "refused" and tried.detail), tried
            # Theirs may train more, but only what no answer needs.
            more = {"header", "empty think block", "after the stop", "token of header and answer"}
            assert (tried.transformers or set()) <= more, tried
        compared = [tried for tried in row.tried if tried.transformers is not None]
        assert (len(compared) > len(row.tried) / 2) == (row.method == "generation")


def test_comparisons_find_a_token_too_much_or_too_few(few, templates, monkeypatch):
    path = next(path for path in templates if path.stem == "qwen3_training")
    real = MaskedTokenizer.tokenize
    for at, value in ((-1, 0), (0, 1)):  # the last stop is left out; the first header is trained

        def off_by_one(self, texts, spans, edges=(), at=at, value=value):
            found = real(self, texts, spans, edges)
            for tokenized in found:
                place = np.flatnonzero(tokenized.mask)[at] if at else 0
                tokenized.mask[place] = value
            return found

        monkeypatch.setattr(MaskedTokenizer, "tokenize", off_by_one)
        tried = survey(path, few).tried
        assert {each.verdict for each in tried} == {"wrong"}
        assert all(
            any(kind.startswith("answer") for kind in each.transformers or ()) for each in tried
        )
