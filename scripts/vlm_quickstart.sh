#!/usr/bin/env bash
# A model learns to see, in minutes: no GPU, no network beyond the package index.
#   bash scripts/vlm_quickstart.sh [FOLDER]     FOLDER (default runs/vlm_quickstart) is made anew
#
# Makes its own Qwen2.5-VL-shaped model and pictures, trains on two processes under FSDP2, evaluates before
# and after on pictures held out by their hash, and on shuffled ones, and exports to HuggingFace.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment() { source scripts/env.sh; }
environment

folder="${1:-runs/vlm_quickstart}"
began=$SECONDS
export OMP_NUM_THREADS=1
step() { printf '\n== %s\n' "$*"; }
answer() { python scripts/evaluate.py "$@" --max-new-tokens 12; }

if [[ -e $folder && ! -d $folder/task ]]; then
    echo "error: $folder exists and is no quickstart folder; name another" >&2
    exit 2
fi
rm -rf "$folder"
mkdir -p "$folder"

step "making a model, its tokenizer and pictures"
python scripts/quickstart/vision.py --out "$folder/task"

step "held-out pictures before training"
answer --hf-model "$folder/task/base" --data "$folder/task/test-00000.parquet" --json "$folder/before.json"

step "finetuning on two processes"
torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 finetune.py \
    --hf-model "$folder/task/base" --finetune-data-files "$folder/task/train-*.parquet" \
    --data-cache-dir "$folder/cache" --config scripts/quickstart/vision.yaml \
    --output-dir "$folder/run" --save-hf

step "held-out pictures after training, and the same questions beside other pictures"
answer --output-dir "$folder/run" --data "$folder/task/test-00000.parquet" --json "$folder/after.json"
answer --output-dir "$folder/run" --data "$folder/task/shuffled-00000.parquet" \
    --json "$folder/shuffled.json"
answer --hf-model "$folder/run/hf" --data "$folder/task/test-00000.parquet" \
    --json "$folder/transformers.json"

python scripts/quickstart/vision_report.py "$folder" "$((SECONDS - began))"
