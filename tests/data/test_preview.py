import json

import pytest

from scripts.preview import main
from tests.data.conftest import make_rows


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview")
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = [json.dumps(row) for row in make_rows(20)]
    rows[3] = "broken"
    rows[5] = json.dumps({"question": "<b>\x1b[31m", "answer": "long " * 300})
    (folder / "a.jsonl").write_text("\n".join(rows) + "\n")

    def call(*flags):
        return main(["--tokenizer", str(folder / "tokenizer"), *map(str, flags)])

    return folder, call


def test_preview_reports_every_row(run, capsys):
    folder, call = run
    out, page = folder / "rows.jsonl", folder / "page.html"
    status = call(
        "--data", folder / "a.jsonl", "--seq-length", 256, "--json", out, "--html", page,
        "--rows", 6, "--global-batch-size", 2,
    )  # fmt: skip
    assert status == 0
    shown = capsys.readouterr().out
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert [entry["row"] for entry in entries] == list(range(20))
    assert {entry["file"] for entry in entries} == {str(folder / "a.jsonl")}
    assert [e["status"] for e in entries].count("kept") == 18
    assert "bad JSON" in entries[3]["reason"]
    assert "longer than --seq-length" in entries[5]["reason"]
    assert "long long" in entries[5]["text"]
    kept = entries[0]
    assert len(kept["input_ids"]) == len(kept["loss_mask"])
    assert sum(kept["loss_mask"]) > 3
    assert kept["text"].startswith("<|im_start|>user\nQuestion 0")
    for expected in ("20 read, 18 kept", "1 dropped: bad JSON", "trained in 100.0%", "per epoch"):
        assert expected in shown
    # Data can send neither escape codes to the terminal nor markup to the page.
    assert "\x1b[31m" not in shown
    assert "<b>" not in page.read_text()
    assert "<span class=t>" in page.read_text()


def test_preview_refuses_bad_input_in_one_line(run, capsys):
    folder, call = run
    for flags, message in (
        (["--data", "gone.jsonl"], "--data gone.jsonl: no such file"),
        ([], "there is no data"),
        (["--data", folder / "a.jsonl", "--separator", "x"], "--separator x"),
    ):
        assert call(*flags) == 2
        assert message in capsys.readouterr().err
