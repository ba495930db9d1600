import gzip
import json
import re

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.sources.readers
from data.errors import DataError
from data.sources.chunks import read_chunk
from data.sources.readers import dataset_chunks, file_chunks


def zst(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


ROWS = [{"question": f"q{i} é", "answer": "a" * i} for i in range(50)]


def read(path):
    return [raw for chunk in file_chunks(path, 0) for raw in read_chunk(chunk)]


def write(path, kind, rows=ROWS):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == ".jsonl":
        path.write_bytes(lines)
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == ".jsonl.zst":
        path.write_bytes(zst(lines))
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif kind == ".csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
        if kind != ".parquet":
            path.write_bytes((gzip.compress if kind.endswith(".gz") else zst)(path.read_bytes()))
    return path


KINDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".parquet", ".parquet.gz",
         ".parquet.zst")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("small", [False, True])
def test_every_file_type_gives_the_rows_in_order(tmp_path, kind, small, monkeypatch):
    if small:  # rows across chunk borders
        monkeypatch.setattr(data.sources.readers, "CHUNK_BYTES", 64)
        monkeypatch.setattr(data.sources.readers, "CHUNK_ROWS", 3)
    raws = read(write(tmp_path / f"rows{kind}", kind))
    assert [raw.row for raw in raws] == ROWS
    assert [raw.number for raw in raws] == list(range(50))


def test_chunks_do_not_depend_on_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(data.sources.readers, "CHUNK_BYTES", 100)
    path = write(tmp_path / "rows.jsonl", ".jsonl")
    assert list(file_chunks(path, 0)) == list(file_chunks(path, 0))


def test_datasets_and_lists_are_sources():
    import datasets

    for rows in (ROWS, datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[::-1] * 2)
                 .select(range(50, 100))):  # fmt: skip
        chunks = dataset_chunks(rows, "rows")
        read_back = [raw.row for chunk in chunks for raw in read_chunk(chunk)]
        assert sorted(r["question"] for r in read_back) == sorted(r["question"] for r in ROWS)


def test_bom_crlf_and_blank_lines_are_no_trouble(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}\r\n{"a": 3}')
    assert [(raw.row, raw.place) for raw in read(path)] == [
        ({"a": 1}, f"{path}:1"),
        ({"a": 2}, f"{path}:4"),
        ({"a": 3}, f"{path}:5"),
    ]


def test_json_suffix_with_one_row_a_line_is_read(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert [raw.row for raw in read(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        (b'{"a": ', "Expecting value"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"\x00\x01\x02binary", ""),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "digits"),
    ],
)
def test_bad_line_is_named_and_the_others_are_read(tmp_path, line, detail):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    first, bad, last = read(path)
    assert (first.row, last.row) == ({"a": 1}, {"a": 2})
    assert bad.place == f"{path}:2"
    assert bad.error.reason == "bad JSON"
    assert detail in bad.error.detail


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1},\n {"a": }]', ":2: not valid JSON"),
        ("a.json", b'[{"a": 1},\n {"a": 2}', ":2: not valid JSON .*ends before"),
        ("a.json", b'[{"a": 1}] trailing', "follows the closing"),
        ("a.json", b'[{"a": 1},\n {"a": 2} {"a": 3}]', ":2: not valid JSON .a comma is missing"),
        ("a.json", b'[{"a": 1},\n,{"a": 2}]', ":2: not valid JSON .a comma too many"),
        ("a.json", b'[{"a": 1},\n]', ":2: not valid JSON .a comma too many"),
        ("a.json", b'[,{"a": 1}]', ":1: not valid JSON .a comma too many"),
        ("a.json", b'[{"a": ' + b"1" * 5000, ":1: not valid JSON"),
        ("a.json", b"[" * 200_000, "nested too deeply"),
        ("a.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("a.jsonl.gz", b"not gzip", "cannot be read as jsonl"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:40], "cannot be read as jsonl"),
        ("a.jsonl.zst", b"not zstd", "cannot be read as jsonl"),
        ("a.jsonl.zst", zst(b'{"a": 1}\n') + b"junk", "cannot be read as jsonl"),
        ("a.parquet.zst", zst(b"PAR1 not really"), "cannot be read as parquet"),
        ("a.csv", b"a,a\n1,2\n", "same name"),
        ("a.csv", b'a,b\n1,2\n"unclosed', ":3: not valid CSV .*never closed"),
        ("a.csv", b'a,"b"b\n1,2\n', ":1: not valid CSV"),
        ("a.csv", b"a,\xff\xfe\n1,1\n", ":1: the header is not UTF-8"),
    ],
)
def test_broken_file_is_one_clear_error(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path.name}.*{message}"):
        read(path)


def test_zst_that_is_cut_anywhere_is_an_error(tmp_path):
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS[:12]]
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(b"".join(lines[:6]))
        out.flush()  # ends a block, at the end of a row
        first = sink.tell()
        out.write(b"".join(lines[6:]))
    whole = sink.getvalue().to_pybytes()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(whole * 2)  # two frames
    assert [raw.row for raw in read(path)] == ROWS[:12] * 2
    assert first < len(whole)  # a cut between two blocks is one of these
    for end in (*range(1, len(whole)), len(whole) + 1, 2 * len(whole) - 1):
        path.write_bytes((whole * 2)[:end])
        with pytest.raises(DataError, match=r"a\.jsonl\.zst: cannot be read as jsonl"):
            read(path)


@pytest.mark.parametrize(
    ("name", "content", "detail"),
    [
        ("a.json", b'[{"a": "1"}, {"a": ' + b"1" * 5000 + b'}, {"a": "2"}]', "digits"),
        ("a.json", b'[{"a": "1"}, {"a": "\xff"}, {"a": "2"}]', "not UTF-8"),
        ("a.csv", b"a\n1\n\xff\n2\n", "not UTF-8, line 3"),
        ("a.csv", b'a\n1\n"x"y\n2\n', "line 3"),
        ("a.csv", b'a\n1\n"x\ny"z\n2\n', "line 4"),
    ],
)
@pytest.mark.parametrize("chunk_rows", [1, 1024])
def test_bad_record_is_named_and_the_others_are_read(
    tmp_path, name, content, detail, chunk_rows, monkeypatch
):
    monkeypatch.setattr(data.sources.readers, "CHUNK_ROWS", chunk_rows)
    path = tmp_path / name
    path.write_bytes(content)
    first, bad, last = read(path)
    assert (first.row, last.row) == ({"a": "1"}, {"a": "2"})
    assert bad.place == f"{path}, row 2"
    assert bad.error.reason == f"bad {path.suffix[1:].upper()}"
    assert detail in bad.error.detail


def test_number_of_too_many_digits_may_cross_a_block(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": "' + "x" * 62_000 + '"}, {"a": ' + "1" * 9000 + '}, {"a": 2}]')
    assert [raw.error is None for raw in read(path)] == [True, False, True]


def test_truncated_parquet_is_one_clear_error(tmp_path):
    path = write(tmp_path / "a.parquet", ".parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read(path)


def odd_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"q": ["a", "b", "c"], **columns}), path)
    return path


def test_parquet_text_that_is_not_utf8_is_a_bad_row(tmp_path):

    ends = pyarrow.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 1, 3, 4)))
    text = pyarrow.StringArray.from_buffers(3, ends, pyarrow.py_buffer(b"x\xff\xfey"))
    first, bad, last = read(odd_parquet(tmp_path / "a.parquet", t=text))
    assert (first.row, last.row) == ({"q": "a", "t": "x"}, {"q": "c", "t": "y"})
    assert bad.place == f"{tmp_path / 'a.parquet'}, row 2"
    assert bad.error.reason == "bad value"
    assert "column 't'" in bad.error.detail


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table([pyarrow.array(["x"])] * 2, names=["q", "q"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match="a.parquet: two columns have the same name: q, q"):
        read(path)


def test_dates_that_python_cannot_hold_are_left_out_of_their_rows(tmp_path):

    dates = pyarrow.array([0, 2**30, 1], pyarrow.date32())
    rows = [raw.row for raw in read(odd_parquet(tmp_path / "a.parquet", t=dates))]
    assert [row["q"] for row in rows] == ["a", "b", "c"]
    assert ["t" in row for row in rows] == [True, False, True]
    zoned = pyarrow.array([0, 1, 2], pyarrow.timestamp("us", tz="Nowhere/Foo"))
    rows = [raw.row for raw in read(odd_parquet(tmp_path / "b.parquet", t=zoned))]
    assert rows == [{"q": "a"}, {"q": "b"}, {"q": "c"}]


@pytest.mark.parametrize("depth", [100, 600, 900, 940, 990])
def test_row_of_an_array_that_is_too_deep_to_send_is_a_bad_row(tmp_path, depth):
    path = tmp_path / "a.json"
    deep = "[" * depth + "]" * depth
    path.write_text(f'[{{"a": 1}}, {{"a": {deep}}}, {{"a": 2}}]')
    first, bad, last = read(path)
    assert (first.row, last.row) == ({"a": 1}, {"a": 2})
    assert bad.place == f"{path}, row 2"
    assert bad.error is None or bad.error.reason == "nested too deeply"
    assert depth < 900 or bad.error is not None


def test_csv_record_of_another_length_is_a_bad_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n3\n4,5\n")
    assert [raw.error is None for raw in read(path)] == [True, False, True]


@given(st.binary(max_size=300))
def test_binary_junk_never_ends_in_a_traceback(tmp_path_factory, junk):
    folder = tmp_path_factory.mktemp("junk")
    for suffix in (".jsonl", ".json", ".csv"):
        path = folder / f"junk{suffix}"
        path.write_bytes(junk)
        try:
            for raw in read(path):
                assert (raw.error is None) or raw.place.startswith(str(path))
        except DataError as error:
            assert suffix != ".jsonl"  # of lines each is a row
            assert re.match(rf"{path}(:\d+)?: ", str(error))


elements = st.recursive(
    st.none() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.lists(elements, max_size=6), st.sampled_from([None, 1]))
def test_json_arrays_are_read_piece_by_piece(tmp_path_factory, rows, indent):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(rows, indent=indent))
    assert [raw.row for raw in read(path)] == rows
