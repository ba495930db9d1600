"""Data preparation side by side: this project, the tokenizer library alone, and TRL.

    python benchmarks/data_pipeline.py --tokenizer DIR --data train.jsonl [--repeat 10] [--trl]

Prints ratios taken in one run; lone times say little on a shared machine. ``ours`` is everything
from files to packs: read, convert, render, mask, tokenise, cache, plan. ``library`` is the
tokenizers library's own batched call on the same rendered text, and nothing else. ``trl`` is what
``SFTTrainer`` does before its first step, with ``assistant_only_loss`` and packing, on the same
data, in as many processes. Rounds alternate, and medians are compared; the range of the ratios of
single rounds tells how far other work on the machine moved them.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trl_rows import TEMPLATE, dataset_of

_MEMORY = """
import json, resource, sys
from post_training.hf.tokenizer import open_tokenizer
from data import SFTDataset, prepare_documents
tokenizer = open_tokenizer(sys.argv[1], "tokenizer")
documents = prepare_documents(files=[sys.argv[2]], tokenizer=tokenizer, seq_length=2048,
                              cache_dir=sys.argv[3], workers=2)
dataset = SFTDataset(None, documents, tokenizer, 2048)
dataset[0]
# Not getrusage: its peak begins with that of the process that this one was forked from.
own = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps([int(own[0].split()[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokenizer", required=True, help="Folder of a tokenizer.")
    parser.add_argument("--data", required=True, help="A jsonl file.")
    parser.add_argument("--repeat", type=int, default=10, help="How often the data is repeated.")
    parser.add_argument("--rounds", type=int, default=3, help="Alternating rounds.")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--trl", action="store_true", help="Also time TRL, if it is installed.")
    parser.add_argument(
        "--memory", action="store_true", help="Also compare peak memory at x1, x10."
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = _compare(args, Path(folder))
    print(json.dumps(results, indent=1))


def _compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from post_training.hf.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(args.tokenizer, "--tokenizer")
    text = Path(args.data).read_text(encoding="utf-8").rstrip("\n") + "\n"
    many = folder / "many.jsonl"
    many.write_text(text * args.repeat, encoding="utf-8")
    rendered = _rendered(tokenizer, Path(args.data))
    ours, library, warm, fill = [], [], [], 0.0
    for _ in range(args.rounds):
        library.append(_library(tokenizer, rendered))
        rate, warm_seconds, fill = _ours(tokenizer, many, folder / "cache", args.seq_length)
        ours.append(rate)
        warm.append(warm_seconds)
    ratios = sorted(a / b for a, b in zip(ours, library, strict=True))
    results: dict[str, Any] = {
        "ours_tokens_per_s": round(statistics.median(ours)),
        "library_tokens_per_s": round(statistics.median(library)),
        "ours_to_library": round(statistics.median(ours) / statistics.median(library), 3),
        "ours_to_library_of_rounds": [round(ratios[0], 3), round(ratios[-1], 3)],
        "warm_start_s": round(statistics.median(warm), 3),
        "fill": round(fill, 5),
    }
    if args.trl:
        rate = _trl(tokenizer, many, args.seq_length, folder)
        results["trl_tokens_per_s"] = round(rate)
        results["ours_to_trl"] = round(statistics.median(ours) / rate, 2)
    if args.memory:
        once = folder / "once.jsonl"
        once.write_text(text, encoding="utf-8")
        small, large = (_peak_memory(args.tokenizer, path, folder) for path in (once, many))
        results["peak_memory_mib"] = {"x1": small, f"x{args.repeat}": large}
        results["peak_memory_growth_mib"] = [
            round(b - a, 1) for a, b in zip(small, large, strict=True)
        ]
    return results


def _ours(tokenizer: Any, path: Path, cache: Path, seq_length: int) -> tuple[float, float, float]:
    """Tokens per second from file to plan, seconds of a second start, fill."""
    from data import SFTDataset, prepare_documents

    def start() -> Any:
        documents = prepare_documents(
            files=[str(path)], tokenizer=tokenizer, seq_length=seq_length, cache_dir=cache
        )
        return SFTDataset(None, documents, tokenizer, seq_length)

    shutil.rmtree(cache, ignore_errors=True)
    began = time.perf_counter()
    dataset = start()
    cold = time.perf_counter() - began
    began = time.perf_counter()
    start()
    warm = time.perf_counter() - began
    return len(dataset.documents.input_ids) / cold, warm, dataset.fill


def _rendered(tokenizer: Any, path: Path) -> list[str]:
    from data.prepare.options import PrepareOptions, tokenize_options
    from data.sources.chunks import read_chunk
    from data.sources.readers import file_chunks
    from data.tokenise.row_renderer import RowRenderer

    settings = PrepareOptions(seq_length=1 << 20, conversation_format="question")
    rows = RowRenderer(tokenize_options(tokenizer, settings)[0])
    return [rows.render(raw).text for chunk in file_chunks(path, 0) for raw in read_chunk(chunk)]


def _library(tokenizer: Any, texts: list[str], batch: int = 1000) -> float:
    """Tokens per second of the tokenizer library alone."""
    backend = tokenizer.backend_tokenizer
    tokens = 0
    began = time.perf_counter()
    for _ in range(2):
        for first in range(0, len(texts), batch):
            encodings = backend.encode_batch(texts[first : first + batch], add_special_tokens=False)
            tokens += sum(len(encoding) for encoding in encodings)
    return tokens / (time.perf_counter() - began)


def _trl(tokenizer: Any, path: Path, seq_length: int, folder: Path) -> float:
    """Tokens per second of TRL's preparation."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    dataset = dataset_of(path)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = Qwen3ForCausalLM(config)
    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        assistant_only_loss=True,
        packing=True,
        max_length=seq_length,
        dataset_num_proc=len(os.sched_getaffinity(0)),
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    began = time.perf_counter()
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=dataset, processing_class=tokenizer
    )
    seconds = time.perf_counter() - began
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    return tokens / seconds


def _peak_memory(tokenizer: str, path: Path, folder: Path) -> list[float]:
    """Peak resident MiB of the main process and of the largest worker."""
    root = Path(__file__).resolve().parent.parent
    cache = folder / f"memory-{path.stem}"
    result = subprocess.run(
        [sys.executable, "-c", _MEMORY, tokenizer, str(path), str(cache)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    return [round(kib / 1024, 1) for kib in json.loads(result.stdout.splitlines()[-1])]


if __name__ == "__main__":
    main()
