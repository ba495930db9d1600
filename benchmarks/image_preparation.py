"""Rows with pictures a second: preparing them, and the model's own image processor over the same rows.

    python benchmarks/image_preparation.py [--processor FOLDER] [--pictures FILE...]

Preparing reads the header and the check sum of a picture; its pixels are decoded when a pack is read. The
ratio of the two, in one run and in one process each, says what is saved. And the size of the cache, in
ids and encoded pictures.
"""

from __future__ import annotations

import argparse
import gc
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoTokenizer

from data import prepare_documents
from data.images.processor import open_processor
from data.prepare.options import PrepareOptions, tokenize_options
from data.sources.readers import file_chunks
from data.tokenise.row_tokenizer import RowTokenizer
from scripts.quickstart import vision
from tests.helpers.vision import save_model

SIZE = (640, 480)
PICTURES, PROCESSED, TIMES = 50, 20, 5


def make_rows(count: int, files: list[str]) -> list[dict[str, Any]]:
    """Rows as of Robo2VLM, with the pictures of files, else with some of a camera's size."""
    pictures = [Path(file).read_bytes() for file in files]
    for seed in range(0 if files else PICTURES):
        coarse = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).save(out, "JPEG")
        pictures.append(out.getvalue())
    return [
        {
            "kind": "any",
            "question": f"Which way does thing {number} move?",
            "choices": "['up', 'down', 'left', 'right']",
            "correct_answer": number % 4,
            # What follows the end of a picture makes it another file.
            "image": {"bytes": pictures[number % len(pictures)] + b"%d" % number, "path": None},
        }
        for number in range(count)
    ]


def fastest(work: Callable[[], Any]) -> float:
    """Seconds of the processor that some work takes when nobody disturbs it: the least of several times."""
    times = []
    for _ in range(TIMES):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def main() -> None:
    """Print the two speeds, their ratio and the size of the cache."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processor", help="folder with a tokenizer and its image processor")
    parser.add_argument("--pictures", nargs="+", default=[], help="files of pictures")
    parser.add_argument("--rows", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = options.processor or str(save_model(folder / "model", "qwen2_5_vl"))
        rows = make_rows(options.rows, options.pictures)
        vision.write_parquet(folder / "rows.parquet", rows)
        tokenizer = AutoTokenizer.from_pretrained(base)
        processor: Any = open_processor(tokenizer, folder / "pictures")
        options_of_rows = {"images": processor.layout, "image_cache": str(folder / "pictures")}
        documents = prepare_documents(
            files=[str(folder / "rows.parquet")],
            tokenizer=tokenizer,
            seq_length=8192,
            cache_dir=folder / "cache",
            **options_of_rows,
        )
        settings = PrepareOptions(8192, conversation_format="choices", **options_of_rows)
        worker = RowTokenizer(tokenize_options(tokenizer, settings)[0])
        chunk = next(file_chunks(folder / "rows.parquet", 0))
        gc.disable()  # as in a worker
        ours = len(worker.chunk(chunk).lengths) / fastest(lambda: worker.chunk(chunk))

        def process() -> None:
            for row in rows[:PROCESSED]:
                processor.theirs(images=[Image.open(io.BytesIO(row["image"]["bytes"]))])
                tokenizer(row["question"] + row["choices"])

        theirs = PROCESSED / fastest(process)
        files = [path for part in ("cache", "pictures") for path in (folder / part).rglob("*.*")]
        stored = sum(path.stat().st_size for path in files)
        encoded = sum(len(row["image"]["bytes"]) for row in rows)
        least = documents.input_ids.nbytes + encoded
        print(f"prepared    {ours:>9,.0f} rows/s")
        print(f"processor   {theirs:>9,.0f} rows/s")
        print(f"ratio       {ours / theirs:>9.1f}")
        print(f"cache       {stored / least:>9.3f} times ids and encoded pictures")


if __name__ == "__main__":
    main()
