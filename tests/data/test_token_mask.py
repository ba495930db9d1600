import pytest

from data.token_mask import token_mask


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


@pytest.mark.parametrize(("begin", "end"), [(2, 9), (0, 7), (2, 7)])
def test_token_across_a_boundary_is_left_out_and_counted(tokenizer, begin, end):
    # The tokenizer was trained on this word, so a boundary inside it falls into a token.
    text = " because"
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    starts = {a for a, _ in encoding.offsets}
    text_kept, crossing = masked(tokenizer, text, (begin, min(end, len(text))))
    assert crossing == (begin not in starts) + (end < len(text) and end not in starts)
    assert text_kept in text[begin:end]


def test_added_token_that_swallows_white_space_is_trained():
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"a": 0, "[U]": 1}, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<end>", rstrip=True)])
    encoding = backend.encode("a<end>\n", add_special_tokens=False)
    assert encoding.offsets[-1] == (1, 7)
    assert token_mask(encoding, [(0, 6)], "a<end>\n", {2})[0].tolist() == [1, 1]
    assert token_mask(encoding, [(0, 6)], "a<end>\n")[0].tolist() == [1, 0]
