#!/usr/bin/env bash
# Is a student with a teacher better than the same one without? Same initialisation, steps, rate and data.
#
#     bash scripts/quickstart/students.sh BASE TASK FOLDER [SEED...]
#
# BASE is the trained teacher (a HuggingFace folder), TASK has train.jsonl and test.jsonl. Prints the held-out
# cross-entropy of both for each seed (default: 1 2 3), which draws 150 rows and their order: with few rows a
# student without a teacher learns them by heart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
base=$1 task=$2 folder=$3
shift 3
mkdir -p "$folder"
python scripts/quickstart/student.py --hf-model "$base" --out "$folder/student" 2>"$folder/student.log"

# Held-out loss in nats a token, from the last record of a run's evaluations.
held_out() {
    python - "$1/metrics.jsonl" <<'PYTHON'
import json, sys
records = [json.loads(line) for line in open(sys.argv[1])]
print(f"{[r['loss'] for r in records if r.get('split') == 'valid'][-1]:.4f}")
PYTHON
}

printf '%-6s %-16s %-16s\n' seed "without teacher" "with teacher"
[[ $# -gt 0 ]] || set -- 1 2 3
for one in "$@"; do
    shuf -n 150 --random-source=<(yes "$one") "$task/train.jsonl" >"$folder/train-$one.jsonl"
    flags=(--hf-model "$folder/student" --finetune-data-files "$folder/train-$one.jsonl"
        --valid-data-files "$task/test.jsonl" --config scripts/quickstart/train.yaml
        --train-iters 120 --seed "$one" --no-save-optim)
    python finetune.py "${flags[@]}" --output-dir "$folder/alone-$one" 2>"$folder/alone-$one.log"
    python finetune.py "${flags[@]}" --output-dir "$folder/taught-$one" \
        --export-kd-teacher-load "$base" 2>"$folder/taught-$one.log"
    printf '%-6s %-16s %-16s\n' "$one" "$(held_out "$folder/alone-$one")" "$(held_out "$folder/taught-$one")"
done
