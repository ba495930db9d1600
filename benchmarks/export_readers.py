"""What another version of transformers makes of exported folders: its token ids, template and logits.

    python -m venv older && older/bin/pip install transformers==4.57.6 torch
    python benchmarks/export_readers.py --python older/bin/python runs/first/hf ...

Logits are computed in fp32 here and there and compared, relative to the largest one. Exit status 1 where
a folder cannot be read there, or reads otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from post_training.hf.tokenizer import PROBES, open_tokenizer

TOLERANCE = 1e-5
_TURNS = [{"role": "user", "content": "Two  plus two?"}, {"role": "assistant", "content": "Four."}]
_READER = """
import json, sys
import torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out, row, probes, turns = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.inference_mode():
    save_file({"logits": model(torch.tensor([row]), use_cache=False).logits[0].contiguous()}, out)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in probes]
text = tokenizer.apply_chat_template(turns, tokenize=False)
limit = model.config.max_position_embeddings
dtype = str(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype)
print(json.dumps([transformers.__version__, ids, text, limit, dtype]))
"""


def compare(folder: str, python: str, out: Path) -> tuple[str, bool]:
    """Read one folder in both environments.

    Returns:
        What was found, and whether it is the same.
    """
    tokenizer = open_tokenizer(folder, "folder")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # Far enough for a wrong rotary base or scaling to show.
    row = [token % model.config.vocab_size for token in range(11, 11 + 7 * 200, 7)]
    with torch.inference_mode():
        ours = model(torch.tensor([row]), use_cache=False).logits[0]
    told = [json.dumps(value) for value in (row, list(PROBES), _TURNS)]
    done = subprocess.run(
        [python, "-c", _READER, folder, str(out), *told], capture_output=True, text=True
    )
    if done.returncode:
        return f"cannot be read: {done.stderr.strip().splitlines()[-1]}", False
    version, ids, text, limit, dtype = json.loads(done.stdout.splitlines()[-1])
    difference = float((load_file(out)["logits"] - ours).abs().max() / ours.abs().max())
    wrong = [
        probe
        for probe, found in zip(PROBES, ids, strict=True)
        if found != tokenizer(probe, add_special_tokens=False)["input_ids"]
    ]
    same_text = text == tokenizer.apply_chat_template(_TURNS, tokenize=False)
    report = (
        f"transformers {version}: logits differ by {difference:.1e}, ids of {len(PROBES) - len(wrong)} of "
        f"{len(PROBES)} texts equal, template {'equal' if same_text else 'DIFFERS'}, {limit} tokens, "
        f"{dtype}"
    )
    return report, difference <= TOLERANCE and same_text and not wrong


def main() -> int:
    """Run the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", help="Exported folders.")
    parser.add_argument("--python", required=True, help="The other environment's interpreter.")
    options = parser.parse_args()
    same = True
    with tempfile.TemporaryDirectory() as scratch:
        for folder in options.folders:
            report, equal = compare(folder, options.python, Path(scratch, "logits"))
            print(f"{folder}: {report}", flush=True)
            same &= equal
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
