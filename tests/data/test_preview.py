import json
import sys

import pytest

from data.preview import row_title
from data.sources.chunks import RawRow
from data.tokenise.row_tokenizer import PreviewRow
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
        settings = ["--tokenizer", folder / "tokenizer", "--data-cache-dir", folder / "cache"]
        return main([str(flag) for flag in (*settings, *flags)])

    return folder, call


def test_preview_reports_every_row(run, capsys):
    folder, call = run
    out, page = folder / "rows.jsonl", folder / "page.html"
    status = call(
        "--data", folder / "a.jsonl", "--seq-length", 256, "--json", out, "--html", page,
        "--rows", 6, "--global-batch-size", 2, "--on-bad-row", "skip",
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
    assert "turns end with ['<|im_end|>']; separator <|endoftext|>" in shown
    for expected in ("20 read, 18 kept", "1 dropped: bad JSON", "trained in 100.0%", "per epoch"):
        assert expected in shown
    # Data can send neither escape codes to the terminal nor markup to the page.
    assert "\x1b[31m" not in shown
    assert "<b>" not in page.read_text()
    # Neighbours that are alike are one span: header, question, answer, stop, and the separator.
    assert page.read_text().partition("<pre>")[2].partition("</pre>")[0].count("<span") < 12
    assert "<span class=t>" in page.read_text()
    # No text makes the page wider than the window, and in a narrow one each figure has its name by it.
    style, _, body = page.read_text().partition("</style>")
    assert "body,table,pre{overflow-wrap:anywhere}" in style and "content:attr(data-name)" in style
    assert "th,td:nth-child(n+3){overflow-wrap:normal}" in style  # 2028 is not 202 8
    headings, cells = body.partition("</table>")[0].count("<th>"), body.count("<td data-name='")
    assert headings == cells == body.count("<td") == 11


def test_preview_refuses_bad_input_in_one_line(run, capsys):
    folder, call = run
    for flags, message in (
        (["--data", "gone.jsonl"], "--data gone.jsonl: no such file"),
        (["--data", "n" * 300], "File name too long"),
        ([], "there is no data"),
        (["--data", folder / "a.jsonl", "--separator", "x"], "--separator x"),
    ):
        assert call(*flags) == 2
        assert message in capsys.readouterr().err


def test_preview_shows_bad_first_rows_and_odd_names_as_the_run_counts_them(run, capsys):
    folder, call = run
    good = [json.dumps(row) for row in make_rows(3)]
    odd = folder / "odd.jsonl"
    odd.write_text("\n".join(['{"\\ud800": 1, "\\u001b[31m": 2}', "{}", *good]) + "\n")
    page = folder / "odd.html"
    assert call("--data", odd, "--on-bad-row", "skip", "--html", page, "--seq-length", 256) == 0
    shown = capsys.readouterr().out
    assert "in columns '\\ud800', '\\x1b[31m'" in shown
    assert "in columns '\\ud800'" in page.read_text().replace("&#x27;", "'")
    assert "5 read, 3 kept" in shown
    assert "2 dropped: missing column" in shown
    assert "5 rows read, 3 kept, dropped: 2 missing column" in shown
    place = RawRow(0, 0, "a\x1b.jsonl:1", None)
    title = row_title(PreviewRow(place, "dropped", "role \ud800\nx"))
    assert title == "a\ufffd.jsonl:1: dropped role ? x"
    assert call("--data", odd) == 2
    assert "odd.jsonl:1: cannot tell the format" in capsys.readouterr().err


@pytest.fixture
def files(run, monkeypatch):
    """Question and message rows, and a converter, in the current folder."""
    folder, _ = run
    monkeypatch.chdir(folder)
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(40)))
    message = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]
    }
    (folder / "m.jsonl").write_text((json.dumps(message) + "\n") * 30)
    (folder / "preview_converter.py").write_text(
        "def convert(row):\n"
        "    return [{'role': 'user', 'content': row['question']},\n"
        "            {'role': 'assistant', 'content': 'converted'}]\n"
    )


def test_preview_ends_with_what_the_run_uses(run, files, capsys):
    _, call = run
    flags = ("--seq-length", 256, "--rows", 0, "--global-batch-size", 2)
    assert call("--data", "q.jsonl=0.5", "m.jsonl=0.5", "--packing", "none", *flags) == 0
    shown = capsys.readouterr().out
    assert "packs     40, fill" in shown
    assert "q.jsonl  (format: question)" in shown
    assert "m.jsonl  (format: messages)" in shown
    assert "of the tokens (50.00% wanted)" in shown
    total = next(line for line in shown.splitlines() if line.startswith("train: "))
    documents = int(total.split()[1])
    assert documents < 70
    assert f"{documents} packs of 256" in total
    assert call("--data", "q.jsonl", "--valid-data-files", "m.jsonl", *flags) == 0
    assert "valid: 30 documents" in capsys.readouterr().out


def test_preview_stops_where_the_run_does(run, files, capsys):
    _, call = run
    for flags, message in (
        (["q.jsonl", "--valid-data-files", "gone.jsonl"], "--valid-data-files gone.jsonl: no such"),
        (["q.jsonl", "m.jsonl"], "error: m.jsonl:1: "),  # one source has one format
        (["a.jsonl"], "a.jsonl:4: bad JSON"),
        (["q.jsonl=1", "m.jsonl"], "give every source a weight"),
        (["q.jsonl", "--finetune-data-files", "m.jsonl"], "give either --data or"),
    ):
        assert call("--rows", 0, "--data", *flags) == 2
        assert message in capsys.readouterr().err


def test_preview_finds_a_converter_in_the_current_folder(run, files, capsys, monkeypatch):
    folder, call = run
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(folder))])
    assert call("--data", "q.jsonl", "--conversation-format", "preview_converter:convert") == 0
    assert (
        "preview_converter:convert, masks by marks; 40 rows read, 40 kept"
        in capsys.readouterr().out
    )


def test_preview_reads_a_well_known_dataset_as_the_run_does(run, capsys, monkeypatch):
    from datasets import Dataset, DatasetDict

    folder, call = run
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]}
    ]
    name = "HuggingFaceH4/ultrachat_200k"  # a local folder of that name comes before the hub
    DatasetDict({"train_sft": Dataset.from_list(rows * 5)}).save_to_disk(folder / name)
    monkeypatch.chdir(folder)
    assert call("--finetune-hf-dataset", name) == 0
    shown = capsys.readouterr().out
    assert "5 read, 5 kept" in shown
    assert "train: 5 documents" in shown
    # Mixed with files, whose columns are others.
    assert call("--finetune-hf-dataset", f"{name}=1", "--data", "q.jsonl=2") == 0
    shown = capsys.readouterr().out
    assert "5 read, 5 kept" in shown
    assert "40 read, 40 kept" in shown
    assert f"train: {name}[train_sft]: format messages, masks by marks; 5 rows read" in shown
    assert "(33.33% wanted)" in shown
