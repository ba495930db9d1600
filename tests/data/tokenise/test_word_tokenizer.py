import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from data.tokenise.word_tokenizer import WordTokenizer, in_ascii

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve"
    r"|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = st.text(st.sampled_from([*map(chr, range(128)), *" \n'sStT'lLaA19.<|"]), max_size=40)


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
    return backend, WordTokenizer.of(backend)


def assert_same(backend: Tokenizer, words: WordTokenizer | None, texts: list[str]) -> None:
    assert words is not None
    expected = backend.encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, expected, strict=True):
        tokens = words.tokens(text)
        assert tokens is not None
        assert tokens[:, 0].tolist() == encoding.ids, repr(text)
        places = [end - begin for begin, end in encoding.offsets]
        assert tokens[:, 1].tolist() == places, repr(text)


def test_all_short_ascii_texts_give_the_ids_of_the_library(both):
    backend, words = both
    every = [chr(code) for code in range(128)]
    assert_same(backend, words, ["".join(pair) for pair in product(every, repeat=2)])
    assert_same(backend, words, ["".join(kinds) for kinds in product(" \n\r'sLx7.<", repeat=4)])


@given(pieces=st.lists(TEXTS | st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_end"])))
def test_any_ascii_text_gives_the_ids_of_the_library(both, pieces):
    backend, words = both
    assert_same(backend, words, ["".join(pieces)])


@pytest.mark.parametrize(
    "name", ["qwen3", "minimind", "gpt2", "deepseek-r1-distill-qwen_assembled"]
)
def test_real_tokenizers_give_the_same_ids(test_data, name):
    backend = Tokenizer.from_file(str(test_data / f"tokenizers/{name}/tokenizer.json"))
    gsm8k = (test_data / "conversations/gsm8k/test.jsonl").read_text().splitlines()
    code = (test_data / "chat_templates/trl/qwen3.jinja").read_text()
    texts = [text for text in [*gsm8k, code, code * 3] if text.isascii()]
    assert_same(backend, WordTokenizer.of(backend), texts)


@pytest.mark.parametrize(
    "expression",
    [
        r"\p{Greek}+",
        r"\P{L}+",
        r"[[:alpha:]]+",
        r"[a-z&&[^s]]+",
        r"\h+",
        r"^a",
        r"a$",
        r"a.",
        r"(?<=a)b",
        r"(?i)a",
        r"a{2}+",
        r"(?>a)",
        r"\u0041",
        r"[a",
        r"(a",
    ],
)
def test_expressions_that_may_mean_something_else_are_left_to_the_library(expression):
    assert in_ascii(expression) is None


def byte_level(**options):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({char: number for number, char in enumerate(alphabet)}, [], **options)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def test_other_builds_of_tokenizers_are_left_to_the_library():
    assert WordTokenizer.of(byte_level()) is not None
    assert WordTokenizer.of(byte_level(dropout=0.1)) is None
    assert WordTokenizer.of(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))) is None
    for normalizer, fits in (
        (normalizers.NFC(), True),
        (normalizers.Sequence([normalizers.NFKC(), normalizers.NFD()]), True),
        (normalizers.Lowercase(), False),
        (normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("_")]), False),
    ):
        backend = byte_level()
        backend.normalizer = normalizer
        assert (WordTokenizer.of(backend) is not None) == fits
    for token, fits in (
        (AddedToken("<a>", special=True), True),
        (AddedToken("<a>", special=True, rstrip=True), False),
        (AddedToken("<a>", special=True, lstrip=True), False),
        (AddedToken("<a>", special=True, single_word=True), False),
    ):
        backend = byte_level()
        backend.add_special_tokens([token])
        assert (WordTokenizer.of(backend) is not None) == fits
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert WordTokenizer.of(backend) is None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert WordTokenizer.of(backend) is None


def test_words_that_their_tokens_do_not_spell_are_left_to_the_library():
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {"z"}) + ["???"]
    numbers = {char: number for number, char in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(numbers, [], unk_token="???", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = WordTokenizer.of(backend)
    assert words is not None
    assert words.tokens("zzz") is None  # its one token has as many characters
    assert words.tokens("a") is not None
    assert words.tokens("é") is None


def test_one_token_inside_another_is_found_as_the_library_finds_it():
    backend = byte_level()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<a>", "<a>b", "a>b<")])
    assert_same(backend, WordTokenizer.of(backend), ["<a>b<a>", "<a>b<", "x<a> b<a>b", "a>b<a>b<"])


def test_an_expression_that_cuts_elsewhere_is_found_out(tokenizer):
    backend = splitting(tokenizer, QWEN)
    added = {str(token): n for n, token in backend.get_added_tokens_decoder().items()}
    right = in_ascii(QWEN)
    assert right is not None
    for wrong in (r"\w+|\W+", right.pattern.replace("[0-9]", "[0-9]+")):
        assert not WordTokenizer(backend, re.compile(wrong, re.ASCII), added).agrees(backend)
    assert WordTokenizer(backend, right, added).agrees(backend)
