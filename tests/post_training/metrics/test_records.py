"""`metrics.jsonl` is read back whatever lies in it."""

from post_training.metrics.records import read_records


def test_lines_that_are_no_records_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    whole = b'{"iteration": 1, "lm_loss": 2.5}\n'
    file.write_bytes(whole + b"\xff\x00\n5\n{}\n[]\nnull\n" + b"[" * 100_000 + b"\n" + whole[:-8])
    assert read_records(file) == [(whole.decode().strip(), {"iteration": 1, "lm_loss": 2.5})]
