import copy
import json
import multiprocessing
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data.prepare.prepare
from data.documents.provenance import document_place
from data.errors import DataError
from data.prepare.options import PrepareOptions
from data.prepare.prepare import (
    _CODE_FOLDERS,
    DAY,
    dataset_template,
    named_settings,
    prepare_documents,
    prepare_rows,
)
from data.templates.tokenizer_facts import template_source
from tests.data.conftest import CHATML, make_rows
from tests.helpers.templates import GENERATION, THINKING


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(tokenizer, files, cache_dir=None, **options):
    options = {"seq_length": 256, "tokenizer": tokenizer, "workers": 0, **options}
    return prepare_documents(files=files, cache_dir=cache_dir, **options)


def same(first, second):
    return all(
        np.array_equal(getattr(first, name), getattr(second, name))
        for name in ("input_ids", "loss_mask", "offsets", "provenance")
    )


def trained_text(tokenizer, documents, index=0):
    ids, mask = documents[index]
    return tokenizer.decode(ids[mask == 1])


def test_documents_hold_the_promised_arrays(tokenizer, rows, tmp_path):
    documents = prepare(tokenizer, [write_rows(tmp_path / "a.jsonl", rows)], tmp_path / "cache")
    assert documents.input_ids.dtype == np.int32
    assert documents.loss_mask.dtype == np.uint8
    assert documents.offsets.dtype == np.int64
    assert len(documents) == len(rows) == len(documents.lengths)
    assert documents.offsets[-1] == len(documents.input_ids) == len(documents.loss_mask)
    assert documents.provenance.tolist() == [[0, i] for i in range(len(rows))]
    assert documents.max_token_id == documents.input_ids.max()
    for index in (0, 7, -1):
        expected = rows[index]["answer"] + "<|im_end|>"
        assert trained_text(tokenizer, documents, index) == expected


def test_what_the_template_and_the_tokenizer_leave_out_is_counted_and_told(
    tokenizer, rows, tmp_path
):
    tool = {"name": "look", "parameters": {"type": "object", "properties": {}}}
    cut = {**rows[2], "answer": "<think>\nLet me"}
    rows = [{**rows[0], "answer": "    return"}, {**rows[1], "tools": [tool]}, cut]
    file = write_rows(tmp_path / "a.jsonl", rows)
    for cache in (None, tmp_path / "cache"):
        # A line break and three spaces would be one token: half header, half answer.
        documents = prepare(tokenizer, [file], cache)
        assert trained_text(tokenizer, documents) == "    return<|im_end|>"
        report = documents.report
        assert report["tools_not_shown"] == 1
        untold = f"1 rows of {file} have tools on offer that the chat template does not show"
        assert any(untold in warning for warning in report["warnings"])
        assert report["unclosed_thoughts"] == 1
        cut_off = f"1 rows of {file} have an answer that ends inside its <think> block"
        assert any(cut_off in warning for warning in report["warnings"])
        assert report["boundary_tokens"] == 0
    shown = CHATML.replace("{%- for", "{{- tools|tojson if tools else '' }}{%- for", 1)
    documents = prepare(tokenizer, [file], chat_template=shown)
    assert documents.report["tools_not_shown"] == 0


def test_cache_memory_and_workers_give_the_same_documents(tokenizer, rows, tmp_path):
    files = [write_rows(tmp_path / f"{i}.jsonl", make_rows(40, i)) for i in range(5)]
    plain = prepare(tokenizer, files)
    cached = prepare(tokenizer, files, tmp_path / "one")
    workers = prepare(tokenizer, files, tmp_path / "two", workers=2)
    again = prepare(tokenizer, files, tmp_path / "one")
    assert isinstance(again.input_ids, np.memmap)
    assert same(plain, cached)
    assert same(cached, workers)
    assert same(cached, again)
    assert cached.fingerprint == workers.fingerprint == again.fingerprint
    assert cached.report == workers.report


def test_another_key_for_anything_that_changes_the_documents(tokenizer, rows, tmp_path):
    # A closing think tag that nothing opened is refused where reasoning is masked.
    rows = [row for row in rows if "think>" not in row["answer"]]
    path = write_rows(tmp_path / "a.jsonl", rows)
    variants: list[dict] = [
        {},
        {"seq_length": 64},
        {"loss_on": "last"},
        {"reasoning": "mask"},
        {"chat_template": GENERATION},
        {"separator": "none"},
        {"conversation_format": "question"},
        {"template_variables": (("x", 1),)},
    ]
    seen = {prepare(tokenizer, [path], tmp_path / "cache", **v).fingerprint for v in variants}
    assert len(seen) == len(variants)
    write_rows(tmp_path / "a.jsonl", rows[:-1])
    assert prepare(tokenizer, [path], tmp_path / "cache").fingerprint not in seen
    assert len(prepare(tokenizer, [path], tmp_path / "cache")) == len(rows) - 1


def test_the_day_that_a_template_writes_is_an_input(tokenizer, rows, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", rows[:3])
    dated = "{{ '<|im_start|>system\\n' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + CHATML

    def documents(template, day):
        options = {"chat_template": template, "template_date": day}
        return prepare(tokenizer, [path], tmp_path / "cache", **options)

    leap, other, again = (documents(dated, f"2024-02-{day}") for day in (29, 28, 29))
    assert "29 Feb 2024" in tokenizer.decode(leap[0][0])
    assert same(leap, again) and leap.fingerprint == again.fingerprint != other.fingerprint
    assert leap.report["made_of"][DAY] == leap.report["template_date"] == "2024-02-29"
    assert documents(dated, None).report["template_date"] == date.today().isoformat()
    # A template without a clock is the same every day.
    undated = documents(CHATML, "2024-02-29")
    assert undated.fingerprint == documents(CHATML, None).fingerprint
    assert DAY not in undated.report["made_of"]
    # Also from a cache that was made without the flag; and not by one that was made with it.
    assert any("has no clock" in warning for warning in undated.report["warnings"])
    again = documents(CHATML, "2024-02-29")
    assert any("has no clock" in warning for warning in again.report["warnings"])
    assert not any("clock" in warning for warning in documents(CHATML, None).report["warnings"])
    with pytest.raises(DataError, match="--template-date tomorrow: expected a day"):
        documents(dated, "tomorrow")


def test_separator_ends_each_document_and_is_never_trained(tokenizer, rows):
    documents = prepare_rows(rows, tokenizer=tokenizer, seq_length=256)
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    last = documents.offsets[1:] - 1
    assert (documents.input_ids[last] == separator).all()
    assert np.count_nonzero(documents.input_ids == separator) == len(documents)
    assert not documents.loss_mask[last].any()


def test_row_that_holds_the_separator_is_refused(tokenizer):
    rows = [{"question": "What is <|endoftext|>?", "answer": "A token."}]
    with pytest.raises(DataError, match="separator in text"):
        prepare_rows(rows, tokenizer=tokenizer, seq_length=256)


def long_rows():
    turns = [("user", "first " * 9), ("assistant", "one " * 9), ("user", "second " * 9),
             ("assistant", "two."), ("user", "third"), ("assistant", "three.")]  # fmt: skip
    messages = [{"role": "system", "content": "Be brief."}]
    messages += [{"role": role, "content": text} for role, text in turns]
    short = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    return [{"messages": messages}, {"messages": short}]


def test_template_that_ends_answers_with_no_token_of_the_tokenizer_is_refused(tokenizer, rows):
    other = CHATML.replace("<|im_", "<SPECIAL_")
    found = r"'<SPECIAL_end\|>', which holds no token .*--chat-template FILE"
    with pytest.raises(DataError, match=found):
        prepare_rows(rows, tokenizer=tokenizer, seq_length=256, chat_template=other)


def test_overlong_documents_are_dropped_counted_refused_or_trimmed(tokenizer):
    rows = long_rows()
    whole = prepare_rows(rows, tokenizer=tokenizer, seq_length=400)
    length = int(whole.lengths[0])
    dropped = prepare_rows(rows, tokenizer=tokenizer, seq_length=length - 1)
    assert dropped.report["dropped"] == {"longer than --seq-length": 1}
    assert dropped.provenance.tolist() == [[0, 1]]
    with pytest.raises(DataError, match=f"row 1: {length - 1} tokens"):
        prepare_rows(rows, tokenizer=tokenizer, seq_length=length - 1, overlong="error")
    trimmed = prepare_rows(rows, tokenizer=tokenizer, seq_length=length - 1, overlong="trim-turns")
    assert trimmed.report["trimmed"] == 1
    assert trimmed.report["turns"] == trimmed.report["stopped_turns"] == 3
    text = tokenizer.decode(trimmed[0][0])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nsecond")
    assert trained_text(tokenizer, trimmed) == "two.<|im_end|>three.<|im_end|>"


def test_trimming_drops_what_no_trimming_can_shorten(tokenizer):
    rows = [*long_rows(), {"question": "x " * 300, "answer": "y"}]
    rows[0] = {"messages": long_rows()[0]["messages"]}
    rows = [rows[0], {"messages": [{"role": "user", "content": "x " * 300},
                                   {"role": "assistant", "content": "y"}]}]  # fmt: skip
    documents = prepare_rows(rows, tokenizer=tokenizer, seq_length=150, overlong="trim-turns")
    assert documents.report["dropped"] == {"longer than --seq-length": 1}


def test_rows_without_anything_to_train_are_counted(tokenizer):
    silent = {"role": "assistant", "content": "Hello.", "loss": False}
    rows = [{"messages": [{"role": "user", "content": "Hi"}, silent]}, *long_rows()]
    documents = prepare_rows(rows, tokenizer=tokenizer, seq_length=400)
    assert documents.report["dropped"] == {"nothing to train": 1}
    told = r"no row can be trained; 1 read, 1 dropped \(nothing to train\)\. Check"
    with pytest.raises(DataError, match=told):
        prepare_rows(rows[:1], tokenizer=tokenizer, seq_length=400)


def test_reasoning_policies_reach_the_mask(tokenizer):
    thought = {"role": "assistant", "content": "<think>\nsum\n</think>\n\nFour."}
    ask = {"role": "user", "content": "2 + 2?"}
    rows = [{"messages": [ask, thought, ask, thought]}]
    trained = {
        policy: trained_text(
            tokenizer,
            prepare_rows(
                rows,
                tokenizer=tokenizer,
                seq_length=400,
                chat_template=THINKING,
                reasoning=policy,
            ),
        )
        for policy in ("keep", "last", "mask")
    }
    turn = "<think>\nsum\n</think>\n\nFour.<|im_end|>"
    assert trained == {
        "keep": turn + turn,
        "last": "Four.<|im_end|>" + turn,
        "mask": "Four.<|im_end|>" * 2,
    }


BAD_LINES = [
    b"not json",
    b"[]",
    b"7",
    b"null",
    b'{"question": "q"}',
    b'{"question": 7, "answer": "a"}',
    b'{"question": "q", "answer": null}',
    b'{"question": "q", "answer": "\\ud800"}',
    b'{"question": "q\\ufdd0", "answer": "a"}',
    b'{"question": "q", "answer": "\xff"}',
    b'{"question": "<|endoftext|>", "answer": "a"}',
    b'{"question": "q", "answer": "a", "tools": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"question": "q", "answer": "a", "tools": [{"x": ' + b'{"y":' * 900 + b"1" + b"}" * 902,
]
GOOD = b'{"question": "q", "answer": "a"}'


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_row_stops_with_its_place_or_is_skipped_and_listed(tokenizer, tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(DataError, match=f"{path}:2: .*--on-bad-row skip"):
        prepare(tokenizer, [str(path)])
    report = prepare(tokenizer, [str(path)], tmp_path / "c", on_bad_row="skip").report
    assert (report["read"], report["kept"], sum(report["dropped"].values())) == (3, 2, 1)
    place, reason, _ = report["bad_rows"][0]
    assert place == f"{path}:2"
    assert report["dropped"] == {reason: 1}
    listed = next((tmp_path / "c").glob("*/bad_rows.jsonl")).read_text()
    assert json.loads(listed)[:2] == [place, reason]


@given(lines=st.lists(st.sampled_from([GOOD, GOOD, *BAD_LINES]), min_size=1, max_size=12))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=25,
)
def test_counts_always_add_up(tokenizer, tmp_path, lines):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, *lines]))
    report = prepare(tokenizer, [str(path)], on_bad_row="skip").report
    assert report["read"] == len(lines) + 1
    assert report["read"] == report["kept"] + sum(report["dropped"].values())
    assert report["kept"] == 1 + lines.count(GOOD)


def test_errors_of_workers_name_the_first_bad_row(tokenizer, tmp_path):
    files = []
    for number in range(4):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes((GOOD + b"\n") * 20 + (b"junk\n" if number > 1 else b""))
        files.append(str(path))
    with pytest.raises(DataError, match="2.jsonl:21: bad JSON"):
        prepare(tokenizer, files, tmp_path / "cache", workers=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": "{{ broken"}, "not a valid Jinja template"),
        ({"chat_template": "gone.jinja"}, "--chat-template gone.jinja: no such file"),
        ({"chat_template": "{{ messages|length }}"}, "cannot be masked"),
        ({"conversation_format": "nope"}, "--conversation-format nope: unknown"),
        ({"separator": "<|im_end|>"}, "--separator .*writes this token"),
        ({"separator": "<nope>"}, "--separator <nope>: not a special token"),
        ({"seq_length": 1}, "--seq-length 1"),
        ({"workers": -1}, "--data-workers -1: expected 0 or more"),
    ],
)
def test_wrong_options_are_refused_by_name(tokenizer, rows, change, message):
    with pytest.raises(DataError, match=message):
        prepare_rows(rows, **{"tokenizer": tokenizer, "seq_length": 256, **change})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", b"{}", "no key chat_template"),
        ("t.json", b"[]", "holds no template"),
        ("t.json", b"{", "holds no template"),
        ("t.json", b'{"chat_template": [1]}', "is no text"),
        ("t.jinja", b"\xff\x00", "holds no template .*utf-8"),
    ],
)
def test_file_that_holds_no_template_is_refused(tokenizer, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"--chat-template .*{name}.*{message}"):
        template_source(tokenizer, str(tmp_path / name))


@pytest.mark.parametrize("first", [{}, {"meta": 1}, {"messages": None}])
def test_bad_first_rows_do_not_hide_the_format(tokenizer, rows, first):
    given = {"tokenizer": tokenizer, "seq_length": 256}
    with pytest.raises(DataError, match="rows, row 1: cannot tell the format"):
        prepare_rows([first, *rows], **given)
    report = prepare_rows([first, first, *rows], on_bad_row="skip", **given).report
    assert (report["format"], report["dropped"]) == ("question", {"missing column": 2})
    with pytest.raises(DataError, match="rows, row 1: cannot tell the format"):
        prepare_rows([first], on_bad_row="skip", **given)


@pytest.mark.slow
@pytest.mark.parametrize("good", [GOOD + b"\n", b'{"question": 5, "answer": [1]}\n'])
def test_broken_line_of_a_dataset_s_folder_is_named(tokenizer, tmp_path, good):
    path = tmp_path / "ds" / "train.jsonl"
    path.parent.mkdir()
    path.write_bytes(good + b"{broken\n")
    with pytest.raises(DataError, match=f"--finetune-hf-dataset .*{path}:2: bad JSON"):
        prepare(tokenizer, [], hf_dataset=str(path.parent))


def test_tokenizer_without_a_template_is_refused(tokenizer, rows):
    import copy

    bare = copy.copy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template. Pass --chat-template"):
        prepare_rows(rows, tokenizer=bare, seq_length=256)


def test_no_data_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="there are no rows"):
        prepare(tokenizer, [str(tmp_path / "a.jsonl")])
    with pytest.raises(DataError, match="found neither"):
        prepare(tokenizer, [])
    with pytest.raises(DataError, match="--finetune-hf-dataset .*cannot be loaded"):
        prepare(tokenizer, [], hf_dataset=str(tmp_path / "gone"))


def test_hf_dataset_folder_is_loaded(tokenizer, rows, tmp_path):
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "ds")
    documents = prepare(tokenizer, [], hf_dataset=str(tmp_path / "ds"))
    assert same(documents, prepare_rows(rows, tokenizer=tokenizer, seq_length=256))


def _prepare_in_process(path, cache, template, queue):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(template)
    documents = prepare(tokenizer, [path], Path(cache))
    queue.put((documents.fingerprint, len(documents)))


@pytest.mark.slow
def test_processes_that_start_at_once_build_one_cache(tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", make_rows(3000))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (path, str(tmp_path / "cache"), str(tmp_path / "tokenizer"), queue)
    processes = [context.Process(target=_prepare_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    results = {queue.get(timeout=1200) for _ in processes}
    for process in processes:
        process.join()
    assert len(results) == 1
    folders = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert len(folders) == 1
    assert not list((tmp_path / "cache").glob("*.building"))


PEAK = """
import resource, sys
from transformers import AutoTokenizer
from data.prepare.prepare import prepare_documents
prepare_documents(files=[sys.argv[1]], tokenizer=AutoTokenizer.from_pretrained(sys.argv[2]),
                  seq_length=256, cache_dir=sys.argv[3], workers=int(sys.argv[4]))
print(max(resource.getrusage(who).ru_maxrss for who in
          (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_data(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    lines = "".join(json.dumps(row) + "\n" for row in make_rows(20_000))
    peaks = []
    for repeat in (1, 10):
        path = tmp_path / f"{repeat}.jsonl"
        path.write_text(lines * repeat)
        arguments = [path, tmp_path / "tokenizer", tmp_path / "cache", 2]
        output = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        peaks.append(int(output.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 50, f"MiB at 20 000 and 200 000 rows: {peaks}"


def test_every_module_that_rows_pass_through_is_part_of_the_key():
    """Another version of them tokenises anew."""
    code = "import sys, data.tokenise.row_tokenizer as _; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    modules = [name.split(".") for name in output.split() if name.startswith("data.")]
    files = {Path(*name) for name in modules if len(name) == 3}  # no rooms, no errors
    assert len(files) > 20
    assert {file.parent for file in files} <= {Path("data", name) for name in _CODE_FOLDERS}
    assert "torch" not in output and "transformers" not in output


def test_a_change_of_code_is_another_key(tokenizer, rows, tmp_path, monkeypatch):
    """Also of a file that is new: there is no list of names."""
    file = write_rows(tmp_path / "a.jsonl", rows[:9])
    folder = tmp_path / "package" / _CODE_FOLDERS[0]
    folder.mkdir(parents=True)
    monkeypatch.setattr(data.prepare.prepare, "_PACKAGE", tmp_path / "package")
    seen = []
    for text in ("x = 1", "x = 2"):
        (folder / "new.py").write_text(text)
        data.prepare.prepare._code_hash.cache_clear()
        seen.append(prepare(tokenizer, [file], tmp_path / "cache"))
    data.prepare.prepare._code_hash.cache_clear()
    assert seen[0].fingerprint != seen[1].fingerprint
    assert seen[0].contents == seen[1].contents


def test_a_cache_is_found_under_any_spelling_and_names_the_files_of_today(
    tokenizer, rows, tmp_path, monkeypatch
):
    untold = {"question": "Who?", "answer": "<think>\nLet me"}
    cache = tmp_path / "cache"
    (tmp_path / "data").mkdir()
    for part in range(2):
        write_rows(tmp_path / "data" / f"{part}.jsonl", [rows[part], untold])
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    first = prepare(tokenizer, [str(tmp_path / "data")], cache)
    for spelling in ("data", "data/*.jsonl", "./link", str(tmp_path / "link"), "moved"):
        if spelling == "moved":
            Path("data").rename(spelling)
        again = prepare(tokenizer, [spelling], cache)
        assert same(first, again) and again.fingerprint == first.fingerprint
        folder = Path(spelling.removesuffix("/*.jsonl"))
        assert again.report["sources"] == [str(folder / f"{part}.jsonl") for part in range(2)]
        assert document_place(again, 3) == f"{folder}/1.jsonl:2"
        assert [str(folder) in warning for warning in again.report["warnings"]] == [True]
    # The same bytes, read as another kind of file.
    lines = prepare(tokenizer, ["moved/0.jsonl"], cache)
    Path("moved/0.jsonl").rename("moved/0.json")
    assert prepare(tokenizer, ["moved/0.json"], cache).fingerprint != lines.fingerprint


@pytest.mark.parametrize(
    ("name", "found"),
    [("nopkg.mod:fn", "No module named 'nopkg'"), ("sys:foo", "no attribute 'foo'"),
     ("sys:maxsize", "is a int, expected a function"), (":fn", "Empty module name"),
     ("broken_format:fn", "division")],
)  # fmt: skip
def test_converter_that_is_not_there_is_refused_before_the_cache(
    tokenizer, tmp_path, monkeypatch, name, found
):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n')
    (tmp_path / "broken_format.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=f"--conversation-format {name}: .*{found}"):
        prepare_documents(
            files=[str(path)],
            tokenizer=tokenizer,
            seq_length=64,
            cache_dir=tmp_path / "cache",
            conversation_format=name,
        )


def test_split_that_a_saved_dataset_lacks_is_refused(tokenizer, tmp_path):
    import datasets

    rows = datasets.Dataset.from_list(make_rows(5))
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train_sft": rows, "test_sft": rows}).save_to_disk(tmp_path / "two")

    def load(name, split):
        return prepare_documents(
            hf_dataset=str(tmp_path / name),
            split=split,
            tokenizer=tokenizer,
            seq_length=256,
            cache_dir=None,
        )

    assert len(load("one", "train")) == len(load("two", "test_sft")) == 5
    with pytest.raises(DataError, match="--finetune-data-split nosuch: .*one holds one dataset"):
        load("one", "nosuch")
    with pytest.raises(DataError, match="-split train: .*two has the splits train_sft, test_sft"):
        load("two", "train")


def test_copy_of_a_named_dataset_may_have_a_train_split(tmp_path):
    folder = tmp_path / "ultrachat_200k"
    folder.mkdir()
    (folder / "train.jsonl").touch()
    settings = PrepareOptions(seq_length=64)
    assert named_settings(str(folder), settings, "train")[1] == "train"
    (folder / "train_sft-00000.parquet").touch()
    assert named_settings(str(folder), settings, "train")[1] == "train_sft"
    assert named_settings("HuggingFaceH4/ultrachat_200k", settings, "train")[1] == "train_sft"


def test_columns_given_for_a_named_dataset_win(tokenizer, tmp_path, monkeypatch):
    import datasets

    from data.prepare import prepare as prepare_module
    from data.rows.converters import FormatOptions

    rows = [{"q": row["question"], "a": row["answer"]} for row in make_rows(5)]
    monkeypatch.setattr(
        prepare_module, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows)
    )
    documents = prepare_documents(
        hf_dataset="Open-Orca/OpenOrca",
        tokenizer=tokenizer,
        seq_length=256,
        cache_dir=None,
        format_options=FormatOptions(prompt_key="q", response_key="a"),
    )
    assert len(documents) == 5
    assert documents.report["format"] == "fields"


def test_raw_text_and_token_ids_need_no_template(tokenizer, tmp_path):
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    said = "What is two plus two?\nFour."
    text = write_rows(tmp_path / "a.jsonl", [{"text": said}, {"text": said + "<|im_end|>"}])
    for options in ({}, {"cache_dir": tmp_path / "cache"}):
        documents = prepare(bare, [text], **options)
        assert documents.report["mask_method"] == "all tokens"
        for ids, mask in (documents[0], documents[1]):
            assert tokenizer.decode(ids) == said + "<|im_end|><|endoftext|>"
            assert mask.tolist() == [0, *[1] * (len(ids) - 2), 0]
    ids = tokenizer(said).input_ids
    row = {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}
    tokens = prepare(bare, [write_rows(tmp_path / "b.jsonl", [row])])
    assert tokens[0][0][:-1].tolist() == ids
    assert tokens[0][1].tolist() == [0] * 3 + [1] * (len(ids) - 3) + [0]
    for option in ({"loss_on": "last"}, {"reasoning": "mask"}):
        with pytest.raises(DataError, match="leave the flag out"):
            prepare(tokenizer, [text], **option)


def test_first_rows_are_another_cache_and_are_told(tokenizer, rows, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", rows)
    whole, part = (
        prepare(tokenizer, [path], tmp_path / "cache", max_rows=most) for most in (None, 7)
    )
    assert (len(whole), len(part), part.report["read"]) == (len(rows), 7, 7)
    assert whole.fingerprint != part.fingerprint
    told = [[w for w in made.report["warnings"] if "--max-rows 7" in w] for made in (whole, part)]
    assert list(map(len, told)) == [0, 1]


def test_unread_columns_and_empty_answers_are_counted_and_told(tokenizer, tmp_path):
    rows = [
        {"question": "q", "answer": "" if n else "a", "id": n + 1, "context": "c" * n}
        for n in range(3)
    ]
    documents = prepare(tokenizer, [write_rows(tmp_path / "a.jsonl", rows)])
    assert documents.report["unread"] == {"context": 2, "id": 3}
    unread, empty = documents.report["warnings"]
    assert "context 2, id 3; --ignore-columns" in unread and empty.startswith("2 rows of ")


def test_a_cache_whose_report_is_another_s_is_told_of(tokenizer, rows, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", rows)
    name = prepare(tokenizer, [file], tmp_path / "cache").fingerprint
    manifest = tmp_path / "cache" / name / "manifest.json"
    said = json.loads(manifest.read_text())
    for key, value in (("unread", 3), ("warnings", None), ("read", {})):
        manifest.write_text(json.dumps(said | {"report": said["report"] | {key: value}}))
        with pytest.raises(DataError, match=f"{name}: not a complete token cache .*Remove the fo"):
            prepare(tokenizer, [file], tmp_path / "cache")


def test_row_s_own_template_variables_and_open_end(tokenizer, tmp_path):
    loud = "{%- if loud %}{{- 'LOUD' }}{%- endif %}" + CHATML
    pair = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes and"}]
    rows = [
        {"messages": pair, "chat_template_kwargs": {"loud": True}},
        {"messages": [pair[0], {**pair[1], "prefix": True}]},
    ]
    documents = prepare(tokenizer, [write_rows(tmp_path / "a.jsonl", rows)], chat_template=loud)
    assert [tokenizer.decode(documents[n][0]).startswith("LOUD") for n in (0, 1)] == [True, False]
    assert trained_text(tokenizer, documents, 0) == "Yes and<|im_end|>"
    assert trained_text(tokenizer, documents, 1) == "Yes and"
    # A variable that the template does not have is a slip of the pen.
    for name, told in (("loud", []), ("lood", ["the chat template has no variable lood"])):
        options = {"chat_template": loud, "template_variables": ((name, True),)}
        warnings = prepare(tokenizer, [str(tmp_path / "a.jsonl")], **options).report["warnings"]
        assert [w.partition(": ")[2] for w in warnings if "variable" in w] == told
    own = [rows[0], {"messages": pair, "chat_template_kwargs": {"lood": True}}]
    documents = prepare(tokenizer, [write_rows(tmp_path / "b.jsonl", own)], chat_template=loud)
    assert documents.report["unread"] == {"chat_template_kwargs.lood": 1}


def test_ids_that_the_tokenizer_does_not_have_are_a_bad_row(tokenizer, tmp_path):
    largest = max(tokenizer.get_vocab().values())
    rows = [{"input_ids": [5, 6, last]} for last in (largest, largest + 1)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=rf"a\.jsonl:2: bad token ids: .* largest id is {largest}"):
        prepare(tokenizer, [file])
    assert len(prepare(tokenizer, [file], on_bad_row="skip")) == 1


def test_dataset_s_own_template_serves_a_tokenizer_that_has_none(tokenizer, tmp_path):
    bare = copy.copy(tokenizer)
    bare.chat_template = None
    folder = tmp_path / "OpenOrca"
    folder.mkdir()
    row = {"id": "x", "system_prompt": "Be brief.", "question": "Two?", "response": "2"}
    write_rows(folder / "train.jsonl", [row])
    for own, said in ((bare, "System:\nBe brief.\n"), (tokenizer, "<|im_start|>system")):
        documents = prepare_documents(
            hf_dataset=str(folder), tokenizer=own, seq_length=256, cache_dir=None, workers=0
        )
        assert tokenizer.decode(documents[0][0]).startswith(said)
        assert trained_text(tokenizer, documents) == "2<|im_end|>"
    assert "Assistant:" in (dataset_template(str(folder)) or "")
