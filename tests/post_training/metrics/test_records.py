"""`metrics.jsonl` is read back whatever lies in it."""

from post_training.metrics.records import read_records


def test_lines_that_are_no_records_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    whole = b'{"iteration": 1, "lm_loss": 2.5}\n'
    file.write_bytes(whole + b"\xff\x00\n5\n{}\n[]\nnull\n" + b"[" * 100_000 + b"\n" + whole[:-8])
    assert read_records(file) == [(whole.decode().strip(), {"iteration": 1, "lm_loss": 2.5})]


def test_numbers_that_cannot_be_drawn_are_none(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for number in ("NaN", "-Infinity", "1e999", "9" * 400):
        file.write_text(f'{{"iteration": 1, "lm_loss": {number}, "lr": -1e-5}}')
        assert [r for _, r in read_records(file)] == [
            {"iteration": 1, "lm_loss": None, "lr": -1e-5}
        ]
