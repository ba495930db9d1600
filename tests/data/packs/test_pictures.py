"""Rows with pictures end to end: what is prepared is what the model's own processor makes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer

from data import prepare_documents
from data.errors import DataError
from data.images import processor as processors
from data.packs.pictures import PictureDataset
from data.rows.converters import FormatOptions
from scripts.quickstart import vision as quickstart
from tests.helpers import vision
from tests.helpers.launch import run_script
from tests.helpers.reference import Recipe

RECIPE = Recipe(global_batch=4, seq_length=160)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return vision.save_model(tmp_path_factory.mktemp("base"), "qwen2_5_vl")


def prepare(base, file, cache, **options):
    tokenizer = AutoTokenizer.from_pretrained(base)
    processor: Any = processors.open_processor(tokenizer, cache / "pictures")
    options = {"seq_length": 160, "cache_dir": cache, **options}
    documents = prepare_documents(
        files=[str(file)],
        tokenizer=tokenizer,
        images=processor.layout,
        image_cache=str(cache / "pictures"),
        **options,
    )
    return documents, processor


def test_packs_hold_what_the_processor_makes(base, tmp_path):
    rows = vision.make_rows(tmp_path, 30)
    documents, processor = prepare(base, tmp_path / "rows.jsonl", tmp_path / "cache")
    again, _ = prepare(base, tmp_path / "rows.jsonl", tmp_path / "cache")  # from the cache
    assert again.contents == documents.contents and len(documents) == len(rows)
    model = vision.make_model("qwen2_5_vl")
    dataset = PictureDataset(processor, 20, again, tokenizer=0, seq_length=160, seed=5)
    seen = set()
    for number in range(8):
        pack, at, used, patches = dataset[number], 0, 0, 0
        for index in dataset.document_indices(number):
            expected = vision.example(
                rows[index], tmp_path, vision.make_tokenizer(), processor.theirs
            )
            length = len(expected["ids"])  # behind it stands the separator
            inside = slice(at, at + length)
            assert torch.equal(pack["input_ids"][inside], expected["ids"])
            assert torch.equal(pack["loss_mask"][inside].long(), expected["mask"])
            grids = expected.get("image_grid_thw")
            kinds = (expected["ids"] == processor.layout.image_id).int()[None]
            positions, _ = model.model.get_rope_index(
                expected["ids"][None], mm_token_type_ids=kinds, image_grid_thw=grids
            )
            assert torch.equal(pack["rope_positions"][inside], positions[:, 0].T)
            if grids is not None:
                count = len(expected["pixel_values"])
                own = pack["pixel_values"][patches : patches + count]
                assert torch.equal(own, expected["pixel_values"])
                assert torch.equal(pack["image_grid_thw"][used : used + len(grids)], grids)
                used, patches = used + len(grids), patches + count
            seen.add(0 if grids is None else len(grids))
            at += length + 1
        assert used == len(pack["image_grid_thw"]) and patches == len(pack["pixel_values"])
    assert seen == {0, 1, 2}


def test_parquet_of_choices_end_to_end(base, tmp_path):
    rows = quickstart.make_rows(0, 40, 0)[0]
    bad = {**rows[3], "correct_answer": 9}
    quickstart.write_parquet(tmp_path / "train-0.parquet", [*rows[:3], bad, *rows[4:20]])
    quickstart.write_parquet(tmp_path / "train-1.parquet", rows[20:])
    options = {"format_options": FormatOptions(ignore_columns=("kind",))}
    glob = tmp_path / "train-*.parquet"
    with pytest.raises(DataError, match=r"train-0.parquet, row 4: answer outside the choices: 9"):
        prepare(base, glob, tmp_path / "cache", **options)
    documents, processor = prepare(base, glob, tmp_path / "cache", on_bad_row="skip", **options)
    assert documents.report["dropped"] == {"answer outside the choices": 1} and len(documents) == 39
    kept = [*rows[:3], *rows[4:]]
    for index, row in enumerate(kept):
        (found,) = documents.pictures_of(index)
        assert found.read(processor.cache) == row["image"]["bytes"]
    # What is kept is the ids and the encoded pictures, each once.
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    ids = documents.input_ids.nbytes + documents.loss_mask.nbytes
    encoded = sum(len(row["image"]["bytes"]) for row in kept)
    stored = sum(p.stat().st_size for p in files if p.suffix == ".pictures" or "_ids" in p.name)
    assert stored <= 1.1 * (ids + encoded)
    # A picture is part of what a document is: the same words beside another are another document.
    same: dict[tuple[str, int], set[int]] = {}
    for row, value in zip(kept, documents.hashes.tolist(), strict=True):
        same.setdefault((row["question"], row["correct_answer"]), set()).add(value)
    assert max(map(len, same.values())) > 1


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        ({"seq_length": 30}, "longer than --seq-length"),
        ({"max_prompt_length": 30}, "prompt longer than --max-prompt-length"),
    ],
)
def test_long_rows_are_counted_and_never_cut(base, tmp_path, options, dropped):
    vision.make_rows(tmp_path, 30)
    documents, processor = prepare(base, tmp_path / "rows.jsonl", tmp_path / "cache", **options)
    assert 0 < documents.report["dropped"][dropped] == 30 - len(documents)
    for index in range(len(documents)):
        ids, mask = documents[index]
        tokens = sum(processor.layout.tokens(p.grid) for p in documents.pictures_of(index))
        assert int((ids == processor.layout.image_id).sum()) == tokens
        assert len(ids) <= 30 or mask.argmax() <= 30
    flag = dropped.split()[-1]
    with pytest.raises(DataError, match=f"Raise {flag}"):
        prepare(base, tmp_path / "rows.jsonl", tmp_path / "cache", overlong="error", **options)


def test_oldest_turns_go_with_their_pictures(base, tmp_path):
    (tmp_path / "a.png").write_bytes(vision.picture(0, 48, 48))
    (tmp_path / "b.png").write_bytes(vision.picture(1, 32, 32))
    turns = []
    for name in ("a.png", "b.png"):
        image = {"type": "image", "image": name}
        turns.append({"role": "user", "content": [image, {"type": "text", "text": "What?"}]})
        turns.append({"role": "assistant", "content": "A fox."})
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    options = {"overlong": "trim-turns", "seq_length": 30}
    documents, processor = prepare(base, tmp_path / "rows.jsonl", tmp_path / "cache", **options)
    assert documents.report["trimmed"] == 1
    assert [Path(p.file).name for p in documents.pictures_of(0)] == ["b.png"]
    assert int((documents[0][0] == processor.layout.image_id).sum()) == 4


def test_micro_batches_without_pictures_get_a_filler(base, tmp_path):
    vision.make_rows(tmp_path, 20, 0.1)
    dataset = vision.prepared(tmp_path, base, RECIPE)
    packs = [dataset[number] for number in range(6)]
    empty = next(pack for pack in packs if not len(pack["image_grid_thw"]))
    full = next(pack for pack in packs if len(pack["image_grid_thw"]))
    assert empty["image_grid_thw"].dtype == torch.int64 == full["image_grid_thw"].dtype
    joined = dataset.join([empty, empty])
    assert joined["filler"].tolist() == [dataset.processor.layout.image_id, dataset.pad_id]
    assert not joined["pixel_values"].any() and joined["image_grid_thw"].tolist() == [[1, 2, 2]]
    joined = dataset.join([empty, full])
    assert len(joined["filler"]) == 0
    assert torch.equal(joined["pixel_values"], full["pixel_values"])


def test_a_picture_that_breaks_later_names_its_row(base, tmp_path):
    vision.make_rows(tmp_path, 6, 1.0)
    dataset = vision.prepared(tmp_path, base, RECIPE)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: .*png: cannot be read"):
        dataset[0]


def test_a_model_of_text_refuses_pictures(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    vision.make_rows(tmp_path, 3, 1.0)
    options = {"tokenizer": tokenizer, "seq_length": 160, "cache_dir": None}
    with pytest.raises(DataError, match="the row has pictures, and a model of text"):
        prepare_documents(files=[str(tmp_path / "rows.jsonl")], **options)


REAL = Path(os.environ.get("SFT_TEST_DATA", "/nowhere"))


@pytest.mark.skipif(not (REAL / "vqa").is_dir(), reason="SFT_TEST_DATA names no folder with it")
def test_puzzles_with_the_processor_of_qwen3_vl(tmp_path):
    folder = real_processor(tmp_path / "model")
    file = REAL / "vqa" / "puzzlevqa" / "puzzlevqa.jsonl"
    keys = FormatOptions(
        prompt_key="question", choice_key="options", answer_key="answer", image_keys=("image",)
    )
    options = {"format_options": keys, "on_bad_row": "skip", "seq_length": 1024}
    documents, processor = prepare(folder, file, tmp_path / "cache", **options)
    assert documents.report["dropped"] == {"ambiguous answer": 6} and len(documents) == 94
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for index in range(0, len(documents), 6):
        row = rows[documents.provenance[index][1]]
        letter = "ABCD"[[str(option) for option in row["options"]].index(str(row["answer"]))]
        listed = "".join(f"\n{a}. {b}" for a, b in zip("ABCD", row["options"], strict=False))
        image = {"type": "image", "image": row["image"]}
        text = {"type": "text", "text": row["question"] + listed}
        said = {"role": "assistant", "content": f"{letter}. {row['answer']}"}
        messages = [{"role": "user", "content": [image, text]}, said]
        expected = vision.example({"messages": messages}, file.parent, tokenizer, theirs)
        ids, mask = documents[index]
        assert ids[:-1].tolist() == expected["ids"].tolist()  # then the separator
        assert mask[:-1].tolist() == expected["mask"].tolist()


def real_processor(folder):
    """The public image processor of Qwen3-VL beside the tokenizer of Qwen3."""
    folder.mkdir()
    parts = [*(REAL / "tokenizers" / "qwen3").iterdir()]
    for path in [*parts, REAL / "vqa" / "qwen3_vl_processor" / "preprocessor_config.json"]:
        (folder / path.name).write_bytes(path.read_bytes())
    template = json.loads((REAL / "vqa" / "qwen3_vl_processor" / "chat_template.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | template))
    return folder


@pytest.mark.slow
def test_preview_shows_the_pictures(base, tmp_path):
    vision.make_rows(tmp_path, 4, 1.0)
    page = tmp_path / "page.html"
    files = ("--tokenizer", str(base), "--data", str(tmp_path / "rows.jsonl"), "--html", str(page))
    cache = ("--data-cache-dir", str(tmp_path / "cache"))
    done = run_script("scripts/preview.py", *files, *cache, "--seq-length", "160", "--rows", "2")
    assert done.returncode == 0, done.stderr
    assert 2 <= page.read_text().count("src='data:image/jpeg;base64,") <= 4
