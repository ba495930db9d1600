import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.tokenise.masked_tokenizer import MaskedTokenizer
from data.tokenise.token_mask import token_mask

CHARS = [*"ab .,\n'", "é", "e\u0301", "ß", "中", "👋", "🏽", "\u2028", "\xa0"]
TOKENS = ["<|im_start|>", "<|im_end|>", "user\n", "It is four.", "The quick "]


@pytest.fixture(scope="module")
def ours(tokenizer):
    return masked(tokenizer)


def masked(tokenizer):
    return MaskedTokenizer(
        tokenizer.backend_tokenizer.to_str(),
        {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()},
        many=True,
    )


@st.composite
def spanned_texts(draw):
    pieces = draw(st.lists(st.sampled_from([*CHARS, *TOKENS]), max_size=12))
    text = "".join(pieces)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return text, [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b]


@given(rows=st.lists(spanned_texts(), max_size=6))
@settings(max_examples=200)
def test_ids_and_masks_are_what_the_library_s_offsets_give(tokenizer, ours, rows):
    backend = tokenizer.backend_tokenizer
    results = ours.tokenize([text for text, _ in rows], [spans for _, spans in rows])
    for (text, spans), result in zip(rows, results, strict=True):
        encoding = backend.encode(text, add_special_tokens=False)
        mask, crossing = token_mask(encoding, spans, text, set(tokenizer.added_tokens_decoder))
        assert result.ids.tolist() == encoding.ids
        assert result.mask.tolist() == mask.tolist()
        assert result.crossing == crossing


@pytest.mark.parametrize("name", ["qwen3", "mistral-7b-instruct", "phi-3-mini", "gpt2"])
def test_real_tokenizers_give_the_same_ids_and_masks(test_data, name):
    text = (test_data / f"tokenizers/{name}/tokenizer.json").read_text()
    backend = Tokenizer.from_str(text)
    added = {n: str(t) for n, t in backend.get_added_tokens_decoder().items()}
    ours = MaskedTokenizer(text, added)
    backend.post_processor = None
    chats = ["Ask: é?\nIt's 7 — “ok” e\u0301 👩‍👩‍👧", "Plain. I'll   go\n\n", "中文 字"]
    spans = [[(5, 9), (12, 20)], [(0, 6), (7, 11)], [(0, 2)]]
    for result, chat, own in zip(ours.tokenize(chats, spans), chats, spans, strict=True):
        encoding = backend.encode(chat, add_special_tokens=False)
        assert result.ids.tolist() == encoding.ids
        assert result.mask.tolist() == token_mask(encoding, own, chat, added)[0].tolist()


def test_texts_that_their_tokens_spell_need_no_offsets(tokenizer, monkeypatch):
    ours = masked(tokenizer)
    monkeypatch.setattr(ours, "_with_offsets", lambda texts, spans: pytest.fail("not needed"))
    texts = ["<|im_start|>assistant\nIt is four.<|im_end|>\n", "Grüße 👋<|im_end|>"]
    spans = [[(22, 43)], [(0, 17)]]
    assert [int(t.mask.sum()) for t in ours.tokenize(texts, spans)] == [
        len(ours.backend.encode(text[a:b], add_special_tokens=False).ids)
        for text, ((a, b),) in zip(texts, spans, strict=True)
    ]


def test_no_texts_give_nothing(tokenizer):
    assert masked(tokenizer).tokenize([], []) == []
    (empty,) = masked(tokenizer).tokenize([""], [[]])
    assert (empty.ids.dtype, len(empty.ids), len(empty.mask)) == (np.int32, 0, 0)


@pytest.mark.parametrize("name", ["embedded", "qwen3", "mistral-7b-instruct", "phi-3-mini", "gpt2"])
def test_prompt_and_answer_are_tokenised_as_at_inference(request, tokenizer, name):
    ours = masked(tokenizer)
    if name != "embedded":
        folder = request.getfixturevalue("test_data") / f"tokenizers/{name}"
        text = (folder / "tokenizer.json").read_text()
        backend = Tokenizer.from_str(text)
        ours = MaskedTokenizer(
            text, {n: t.content for n, t in backend.get_added_tokens_decoder().items()}
        )
    prompt, answer, after = "User: is it? Assistant: ", "It is four. ", "  User: why? "
    text = prompt + answer + after
    begin, end = len(prompt), len(prompt + answer)
    (whole,) = ours.tokenize([text], [[(begin, end)]])
    assert whole.crossing
    (cut,) = ours.tokenize([text], [[(begin, end)]], [[begin, end]])
    assert cut.crossing == 0
    trained = np.flatnonzero(cut.mask)
    first, last = int(trained[0]), int(trained[-1]) + 1
    asked = ours.backend.encode(prompt, add_special_tokens=False).ids
    assert cut.ids[:first].tolist() == asked  # what inference is given
    offsets = ours.offsets(text, [begin, end])
    assert len(offsets) == len(cut.ids)
    # What it writes, joined to that, is the answer, and no blank more.
    decoded = ours.backend.decode(cut.ids[:last].tolist(), skip_special_tokens=False)
    assert decoded.strip() == (prompt + answer).strip()
    assert cut.mask[first:last].all()
    assert (offsets[first][0], offsets[last - 1][1]) == (begin, end)
