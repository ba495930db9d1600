#!/usr/bin/env bash
# The quickstart's model learns ten of its twelve kinds of questions, and then an adapter the two others.
#   bash scripts/lora_quickstart.sh [FOLDER]     FOLDER (default runs/lora) is made anew
#
# The adapter is trained on two processes, exported for PEFT, and answers with plain transformers as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# In a function: what is sourced without arguments is given those of its caller, as extras to install.
environment() { source scripts/env.sh lora; }
environment

folder="${1:-runs/lora}"
began=$SECONDS
export OMP_NUM_THREADS=1
step() { printf '\n== %s\n' "$*"; }
on_two() { torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 "$@"; }
answers() { python scripts/evaluate.py --data "$folder/task/test.jsonl" --max-new-tokens 48 "$@"; }

if [[ -e $folder && ! -d $folder/task ]]; then
    echo "error: $folder exists and is no folder of this script; name another" >&2
    exit 2
fi
rm -rf "$folder"
mkdir -p "$folder"

step "making a base model, its tokenizer and a dataset; two kinds are kept back"
python scripts/quickstart/task.py --out "$folder/task"
python scripts/quickstart/kinds.py --data "$folder/task/train.jsonl"

step "finetuning the whole model on ten kinds"
on_two finetune.py --hf-model "$folder/task/base" --finetune-data-files "$folder/task/ten.jsonl" \
    --tensor-model-parallel-size 2 --config scripts/quickstart/train.yaml \
    --output-dir "$folder/ten" --save-hf
answers --hf-model "$folder/ten/hf" --json "$folder/before.json"

step "training an adapter of it on the two others, and a few rows of the ten"
on_two finetune.py --hf-model "$folder/ten/hf" --finetune-data-files "$folder/task/two.jsonl" \
    --tensor-model-parallel-size 2 --sequence-parallel --config scripts/quickstart/train.yaml \
    --train-iters 600 --lr 1e-2 --lora-rank 16 --output-dir "$folder/run"
answers --output-dir "$folder/run" --json "$folder/after.json"

step "the adapter as PEFT stores it"
python scripts/export_hf.py --output-dir "$folder/run" --adapter
answers --hf-model "$folder/run/adapter" --model-backend transformers --json "$folder/peft.json"

python scripts/quickstart/lora_report.py "$folder" "$((SECONDS - began))"
