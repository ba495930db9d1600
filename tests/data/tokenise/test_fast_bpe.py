import contextlib
import json
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from data.prepare import prepare
from data.tokenise.fast_bpe import FastBPE
from data.tokenise.masked_tokenizer import MaskedTokenizer

pytest.importorskip("tiktoken")

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve"
    r"|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LETTERS = [*map(chr, range(128)), *" \n'sStT'lLaA19.<|éß中文。，\u3000ñ🙂"]
TEXTS = st.text(st.sampled_from(LETTERS), max_size=40)


def splitting(tokenizer, expression):
    """The small tokenizer with another expression for words."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


@pytest.fixture(scope="module", params=["GPT-2", "Qwen", "o200k"])
def both(request, tokenizer):
    """A tokenizer of the library, and ours of it."""
    if request.param == "GPT-2":
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    else:
        backend = splitting(tokenizer, {"Qwen": QWEN, "o200k": O200K}[request.param])
    return backend, FastBPE.of(backend)


def assert_same(backend: Tokenizer, words: FastBPE | None, texts: list[str]) -> None:
    assert words is not None
    expected = backend.encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, expected, strict=True):
        tokens = words.tokens(text)
        assert tokens is not None
        assert tokens[:, 0].tolist() == encoding.ids, repr(text)
        assert tokens[:, 1].sum() == len(text.encode())
        if text.isascii():
            places = [end - begin for begin, end in encoding.offsets]
            assert tokens[:, 1].tolist() == places, repr(text)


def test_all_short_texts_give_the_ids_of_the_library(both):
    backend, words = both
    every = [chr(code) for code in range(128)]
    assert_same(backend, words, ["".join(pair) for pair in product(every, repeat=2)])
    assert_same(backend, words, ["".join(kinds) for kinds in product(" \n\r'sLx7中<é", repeat=4)])


@given(pieces=st.lists(TEXTS | st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_end"])))
def test_any_text_gives_the_ids_of_the_library(both, pieces):
    backend, words = both
    assert_same(backend, words, ["".join(pieces)])


@pytest.mark.parametrize(
    "name", ["qwen3", "minimind", "gpt2", "deepseek-r1-distill-qwen_assembled"]
)
def test_real_tokenizers_give_the_same_ids(test_data, name):
    backend = Tokenizer.from_file(str(test_data / f"tokenizers/{name}/tokenizer.json"))
    gsm8k = (test_data / "conversations/gsm8k/test.jsonl").read_text().splitlines()
    code = (test_data / "chat_templates/trl/qwen3.jinja").read_text()
    chinese = (test_data / "conversations/llamafactory/identity.json").read_text()
    texts = [text for text in [*gsm8k, code, code * 3] if text.isascii()] + [chinese]
    assert_same(backend, FastBPE.of(backend), texts)


def byte_level(merges=(), more=(), **options):
    """A tokenizer of bytes with some rules, and tokens that no rule makes."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges), *more]
    model = models.BPE({piece: n for n, piece in enumerate(pieces)}, list(merges), **options)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


@pytest.mark.parametrize("expression", [r"[a-z&&[^s]]+", "^a", r"\w+|\W+", "(?i)s|.", r"[a"])
def test_expressions_that_mean_something_else_are_left_to_the_library(tokenizer, expression):
    backend = byte_level()
    with contextlib.suppress(Exception):  # what the library does not know either
        backend = splitting(tokenizer, expression)
    fast = FastBPE.of(backend)
    if fast is not None:
        assert_same(backend, fast, ["as s\na", "a\nas", "Ss 1"])


def test_other_builds_of_tokenizers_are_left_to_the_library():
    assert FastBPE.of(byte_level()) is not None
    assert FastBPE.of(byte_level(dropout=0.1)) is None
    assert FastBPE.of(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))) is None
    for normalizer, fits in (
        (normalizers.NFC(), True),
        (normalizers.NFKC(), False),
        (normalizers.Lowercase(), False),
        (normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("_")]), False),
    ):
        backend = byte_level()
        backend.normalizer = normalizer
        assert (FastBPE.of(backend) is not None) == fits
    for token, fits in (
        (AddedToken("<a>", special=True), True),
        (AddedToken("<a>", special=True, rstrip=True), False),
        (AddedToken("<a>", special=True, lstrip=True), False),
        (AddedToken("<a>", special=True, single_word=True), False),
    ):
        backend = byte_level()
        backend.add_special_tokens([token])
        assert (FastBPE.of(backend) is not None) == fits
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<b>", "<b>c")])
    assert FastBPE.of(backend) is None, "one begins as another does"
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert FastBPE.of(backend) is None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert FastBPE.of(backend) is None


@pytest.mark.parametrize(
    ("merges", "more", "fits"),
    [
        ([("a", "b"), ("ab", "c")], [], True),
        ([("a", "b"), ("b", "c"), ("a", "bc")], [], False),  # the rule for abc is never used
        ([("a", "b")], ["abc"], False),  # there is none
        ([("a", "b"), ("ab", "c"), ("c", "d")][::-1], [], True),
    ],
)
@pytest.mark.parametrize("ignore", [False, True])
def test_rules_that_do_not_make_their_tokens_are_left_to_the_library(merges, more, fits, ignore):
    backend = byte_level(merges, more, ignore_merges=ignore)
    fast = FastBPE.of(backend)
    assert (fast is not None) == fits
    assert backend.model.ignore_merges == ignore
    if fast is not None:
        assert_same(backend, fast, ["".join(text) for text in product("abcd", repeat=5)])


def test_rules_in_another_order_than_their_tokens_are_left_to_the_library():
    backend = byte_level([("b", "c"), ("a", "b")])
    facts = json.loads(backend.to_str())
    facts["model"]["merges"].reverse()
    turned = Tokenizer.from_str(json.dumps(facts))
    assert turned.encode("abc").ids != backend.encode("abc").ids
    assert FastBPE.of(backend) is not None and FastBPE.of(turned) is None


def test_texts_that_a_version_of_unicode_decides_are_left_to_the_library():
    fast = FastBPE.of(byte_level())
    assert fast is not None
    for text, ours in (("é", True), ("e\u0301", False), ("\ua7cb", False), ("\U00031350", False)):
        assert (fast.tokens(text) is not None) == ours


def test_a_text_that_is_too_much_for_it_is_left_to_the_library(tokenizer):
    fast = FastBPE.of(splitting(tokenizer, QWEN))
    assert fast is not None and fast.tokens(" " * 3_000_000 + "x") is None


def test_it_is_compared_with_the_library(tokenizer, monkeypatch):
    json_text = tokenizer.backend_tokenizer.to_str()
    texts = ["One two, three."] * 9
    few, many = (MaskedTokenizer(json_text, {}, many) for many in (False, True))
    assert few._fast is None and many._fast is not None
    before, after = (each.tokenize(texts, [[(0, 3)]] * 9) for each in (few, many))
    assert [each.ids.tolist() for each in before] == [each.ids.tolist() for each in after]
    assert [each.mask.tolist() for each in before] == [each.mask.tolist() for each in after]
    wrong = many._fast.tokens("One two, four.")
    monkeypatch.setattr(many._fast, "tokens", lambda text: wrong)
    with pytest.raises(RuntimeError, match="gives other ids"):
        many.tokenize(texts, [[(0, 3)]] * 9)


@pytest.mark.parametrize("workers", [0, 1])
def test_it_is_made_for_large_data_alone(tokenizer, tmp_path, monkeypatch, workers):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?", "answer": "2"}\n' * 3)
    made, of = [], FastBPE.of

    def counted(*given):
        made.append(given)
        return of(*given)

    monkeypatch.setattr(FastBPE, "of", counted)
    found = []
    for limit in (prepare._FAST_BYTES, 0):
        monkeypatch.setattr(prepare, "_FAST_BYTES", limit)
        found.append(
            prepare.prepare_documents(
                files=[str(rows)],
                tokenizer=tokenizer,
                seq_length=64,
                workers=workers,
                cache_dir=tmp_path / f"cache {limit}",
            )
        )
        assert len(made) == (limit == 0 and workers == 0)  # a worker makes its own
    assert found[0].input_ids.tolist() == found[1].input_ids.tolist()
