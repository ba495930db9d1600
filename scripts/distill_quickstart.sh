#!/usr/bin/env bash
# Distillation from nothing: no GPU, no network beyond the package index.
#   bash scripts/distill_quickstart.sh [FOLDER] [BASE]
#     FOLDER (default runs/distill) is made anew
#     BASE   a finished quickstart's folder whose model is taken (default: one is trained in FOLDER/base)
#
# Stores the features of a small base, trains a draft for speculative decoding from them, and measures how many
# drafted tokens the base accepts before and after. Then trains a student of half its depth with the base as
# teacher, and the same student without.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# In a function: what is sourced without arguments is given those of its caller, as extras to install.
environment() { source scripts/env.sh; }
environment

folder="${1:-runs/distill}"
base="${2:-$folder/base}"
seed="${SEED:-1234}"
began=$SECONDS
export OMP_NUM_THREADS=1
step() { printf '\n== %s\n' "$*"; }

if [[ -e $folder && ! -f $folder/.distill ]]; then
    echo "error: $folder exists and is no folder of this script; name another" >&2
    exit 2
fi
rm -rf "$folder"
mkdir -p "$folder"
: >"$folder/.distill"

if [[ ! -d $base/run/hf ]]; then
    step "training the base, as scripts/quickstart.sh does"
    python scripts/quickstart/task.py --out "$base/task"
    torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 finetune.py \
        --hf-model "$base/task/base" --finetune-data-files "$base/task/train.jsonl" \
        --tensor-model-parallel-size 2 --config scripts/quickstart/train.yaml --save-interval 1000 \
        --output-dir "$base/run" --save-hf
fi
hf="$base/run/hf"
head -n 80 "$base/task/test.jsonl" >"$folder/held_out.jsonl"

step "storing the base's features of 1,600 conversations"
torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 scripts/extract_features.py \
    --hf-model "$hf" --finetune-data-files "$base/task/train.jsonl" --max-rows 1600 --ignore-columns kind \
    --seq-length 512 --output-dir "$folder/features"

draft() { # name, further flags
    python finetune.py --export-offline-model --offline-distillation-data "$folder/features" --hf-model "$hf" \
        --config scripts/quickstart/draft.yaml --seed "$seed" --output-dir "$folder/$1" "${@:2}"
    python scripts/export_hf.py --output-dir "$folder/$1"
    python scripts/evaluate_draft.py --hf-model "$hf" --draft "$folder/$1/draft" \
        --data "$folder/held_out.jsonl" --max-new-tokens 48 --json "$folder/$1.json"
}
step "a draft that has learned nothing yet"
draft untrained --train-iters 1 --lr 0 --min-lr 0 --lr-warmup-iters 0 --no-isolation-check
step "training the draft from the features"
draft draft

step "a student of half the base's depth, without a teacher and with it"
students=0
bash scripts/quickstart/students.sh "$hf" "$base/task" "$folder/students" 1 || students=$?

python scripts/quickstart/distill_report.py "$folder" "$((SECONDS - began))"
exit "$students"
