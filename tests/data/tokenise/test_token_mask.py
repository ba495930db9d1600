import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data.tokenise.token_mask import token_mask


def masked(tokenizer, text, *spans, added=()):
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    mask, crossing = token_mask(encoding, list(spans), text, added)
    return tokenizer.decode([i for i, m in zip(encoding.ids, mask, strict=True) if m]), crossing


def test_tokens_within_the_span_are_trained(tokenizer):
    text = "<|im_start|>assistant\nIt is four.<|im_end|>\n"
    begin, end = text.index("It"), text.index("\n", 25)
    assert masked(tokenizer, text, (begin, end)) == ("It is four.<|im_end|>", 0)


def test_bytes_of_one_character_are_trained_together(tokenizer):
    text = "a👋🏽b"
    assert masked(tokenizer, text, (1, 3)) == ("👋🏽", 0)


@pytest.mark.parametrize(
    ("span", "expected", "crossings"),
    [
        ((0, 8), [1, 1, 1], 0),
        ((1, 8), [0, 1, 1], 1),  # begins inside "ab"
        ((0, 7), [1, 1, 0], 1),  # ends inside "ef"
        ((1, 7), [0, 1, 0], 2),
        ((2, 6), [0, 1, 0], 0),  # white space belongs to no token here
        ((2, 3), [0, 0, 0], 0),
    ],
)
def test_token_across_a_boundary_is_left_out_and_counted(span, expected, crossings):
    backend = Tokenizer(models.WordLevel({"ab": 0, "cd": 1, "ef": 2}, unk_token="ab"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    text = "ab cd ef"
    mask, crossing = token_mask(backend.encode(text), [span], text)
    assert mask.tolist() == expected
    assert crossing == crossings


def test_added_token_that_swallows_white_space_is_trained():
    backend = Tokenizer(models.WordLevel({"a": 0, "[U]": 1}, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<end>", rstrip=True)])
    encoding = backend.encode("a<end>\n", add_special_tokens=False)
    assert encoding.offsets[-1] == (1, 7)
    assert token_mask(encoding, [(0, 6)], "a<end>\n", {2})[0].tolist() == [1, 1]
    assert token_mask(encoding, [(0, 6)], "a<end>\n")[0].tolist() == [1, 0]
