#!/usr/bin/env bash
# From a fresh clone to a finetuned model: no GPU, no network beyond the package index.
#   bash scripts/quickstart.sh [FOLDER]     FOLDER (default runs/quickstart) is made anew
#
# Makes its own base model and data, trains on two processes with tensor parallelism, evaluates before
# and after on held-out questions, exports to HuggingFace and answers with plain transformers as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# In a function: what is sourced without arguments is given those of its caller, as extras to install.
environment() { source scripts/env.sh; }
environment

folder="${1:-runs/quickstart}"
began=$SECONDS
export OMP_NUM_THREADS=1
step() { printf '\n== %s\n' "$*"; }

if [[ -e $folder && ! -d $folder/task ]]; then
    echo "error: $folder exists and is no quickstart folder; name another" >&2
    exit 2
fi
rm -rf "$folder"
mkdir -p "$folder"

step "making a base model, its tokenizer and a dataset"
python scripts/quickstart/task.py --out "$folder/task"

step "held-out questions before training"
python scripts/evaluate.py --hf-model "$folder/task/base" --data "$folder/task/test.jsonl" \
    --max-new-tokens 48 --json "$folder/before.json"

step "finetuning on two processes, tensor parallel"
torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 finetune.py \
    --hf-model "$folder/task/base" --finetune-data-files "$folder/task/train.jsonl" \
    --tensor-model-parallel-size 2 --config scripts/quickstart/train.yaml --save-interval 250 \
    --output-dir "$folder/run" --save-hf

step "held-out questions after training"
python scripts/evaluate.py --output-dir "$folder/run" --data "$folder/task/test.jsonl" \
    --max-new-tokens 48 --json "$folder/after.json"
python scripts/evaluate.py --hf-model "$folder/run/hf" --model-backend transformers \
    --data "$folder/task/test.jsonl" --max-new-tokens 48 --json "$folder/transformers.json"

python scripts/quickstart/report.py "$folder" "$((SECONDS - began))"
