"""What stored features cost: reading them, writing them, and packed drafts against one document a row.

    python benchmarks/offline_features.py --folder runs/distill --base runs/distill/base

FOLDER is a finished `scripts/distill_quickstart.sh`. Ratios taken in one run, alternating, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_EXTRACTION = """
import json, sys, time
import numpy as np
from scripts import extract_features as script
from post_training.distillation import extraction
hf, data, folder = sys.argv[1:4]
kept, plain = [], []
run = extraction.Extractor.run
clock = lambda: np.array([time.perf_counter(), time.process_time()])
def timed(self, rows, count):
    for _ in range(3):
        for keeps, times in ((True, kept), (False, plain)):
            hooks = {m: dict(m._forward_hooks) for m in self.model.modules() if m._forward_hooks}
            whole = self._whole
            if not keeps:
                for module in hooks:
                    module._forward_hooks.clear()
                self._whole = lambda states: None
            began = clock()
            found = run(self, rows, count)
            times.append(clock() - began)
            for module, of in hooks.items():
                module._forward_hooks.update(of)
            self._whole = whole
    return run(self, rows, count)
extraction.Extractor.run = timed
write = extraction.FeatureWriter.write
written = []
def timed_write(self, *arguments):
    began = clock()
    write(self, *arguments)
    written.append(clock() - began)
extraction.FeatureWriter.write = timed_write
words = "--max-rows 1600 --ignore-columns kind --seq-length 512 --output-dir".split()
assert script.main(["--hf-model", hf, "--finetune-data-files", data, *words, folder]) == 0
print(json.dumps(list(np.median(plain, 0) / (np.median(kept, 0) + sum(written)))))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", required=True, type=lambda text: str(Path(text).resolve()))
    parser.add_argument("--base", required=True, type=lambda text: str(Path(text).resolve()))
    options = parser.parse_args()
    hf = f"{options.base}/run/hf"
    waits: list[float] = []
    rates: dict[str, list[float]] = {"best-fit": [], "none": []}
    for _ in range(3):
        for packing, found in rates.items():
            with tempfile.TemporaryDirectory() as folder:
                words = ["--export-offline-model", "--hf-model", hf, "--output-dir", folder]
                words += ["--offline-distillation-data", f"{options.folder}/features"]
                words += ["--config", "scripts/quickstart/draft.yaml", "--packing", packing]
                words += ["--train-iters", "40", "--lr-warmup-iters", "1", "--no-isolation-check"]
                command = [sys.executable, "finetune.py", *words]
                subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
                lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").open()]
                steps = [line for line in lines if "lm_loss" in line][5:]
                found.append(statistics.median(step["real_tokens_per_s"] for step in steps))
                if packing != "none":
                    waits += [step["data_wait_fraction"] for step in steps]
    with tempfile.TemporaryDirectory() as folder:
        words = [hf, f"{options.base}/task/train.jsonl", folder]
        done = subprocess.run(
            [sys.executable, "-c", _EXTRACTION, *words],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
            text=True,
        )
    share, by_cpu = json.loads(done.stdout.splitlines()[-1])
    packed, alone = (statistics.median(rates[packing]) for packing in ("best-fit", "none"))
    print(f"reading features: {statistics.median(waits):.2%} of a step's time")
    print(
        f"extraction, written to disk: {share:.1%} of the base's own forward rate, {by_cpu:.1%} by CPU time"
    )
    print(f"packed drafts: {packed / alone:.2f} times the tokens/s of one document a row")


if __name__ == "__main__":
    main()
