import json

import pytest

from data.errors import DataError
from data.sources.chunks import first_rows, read_chunk
from data.sources.json_objects import json_layout
from data.sources.readers import dataset_chunks, file_chunks

ROWS = [{"question": f"q{n}", "answer": "a"} for n in range(3)]
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "f"}]}
COLUMNS = {"question": ["q0", "q1", "q2"], "answer": ["a"] * 3}


def read(path):
    return [raw.row for chunk in file_chunks(path, 0) for raw in read_chunk(chunk)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("value", "rows"),
    [
        (ROWS, ROWS),
        (ROWS[0], ROWS[:1]),
        (CHAT, [CHAT]),
        ({"input_ids": [1, 2], "labels": [1, 2]}, [{"input_ids": [1, 2], "labels": [1, 2]}]),
        ({"version": 1, "data": ROWS}, ROWS),
        ({"train": ROWS}, ROWS),
        (COLUMNS, ROWS),
        ({k: dict(zip("012", v, strict=True)) for k, v in COLUMNS.items()}, ROWS),
        ({"messages": [CHAT["messages"]] * 2}, [{"messages": CHAT["messages"]}] * 2),
    ],
)
def test_rows_of_a_json_file_however_it_is_laid_out(tmp_path, value, rows, indent):
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(value, indent=indent))
    assert read(path) == rows


def test_lines_stay_lines(tmp_path):
    path = tmp_path / "a.json"
    for text in ('{"a": 1}\n{"a": 2}\n', '{"a": x}\n{"a": 2}\n', "\n3\n{}\n"):
        path.write_text(text)
        assert json_layout(path) == "lines"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n "a": 1,\n "b": }', ":3: not valid JSON"),
        ('{\n "data": [{"a": 1}],\n "rows": [{"a": 2}]}', "cannot be told"),
    ],
)
def test_object_that_cannot_be_read_is_refused(tmp_path, text, said):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        read(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "dataset"])
def test_first_rows_are_the_same_rows_and_no_more(tmp_path, kind):
    rows = [{"n": number} for number in range(2000)]
    path = tmp_path / f"a.{kind}"
    if kind == "dataset":
        from datasets import Dataset

        chunks = lambda: dataset_chunks(Dataset.from_list(rows), "rows")  # noqa: E731
    else:
        lines = "\n\n".join(map(json.dumps, rows))
        path.write_text(lines if kind == "jsonl" else json.dumps(rows))
        chunks = lambda: file_chunks(path, 0)  # noqa: E731
    for most in (1, 1024, 1500, 5000, None):
        kept = [raw.row for chunk in first_rows(chunks(), most) for raw in read_chunk(chunk)]
        assert kept == rows[:most]
