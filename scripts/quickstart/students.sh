#!/usr/bin/env bash
# Is a student with a teacher better than the same one without? Same initialisation, steps, rate and data.
#
#     bash scripts/quickstart/students.sh BASE TASK FOLDER [SEED...]
#
# BASE is the trained teacher (a HuggingFace folder), TASK has train.jsonl and test.jsonl. Prints the held-out
# cross-entropy of both for each seed (default: 1 2 3 4 5), which draws 150 rows and their order: with few rows a
# student without a teacher learns them by heart. The status is 1 if a teacher did not help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
environment() { source scripts/env.sh; }
environment
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
base=$1 task=$2 folder=$3
shift 3
mkdir -p "$folder"
python scripts/quickstart/student.py --hf-model "$base" --out "$folder/student" 2>"$folder/student.log"

train() { # name, further flags: trains, and prints the held-out loss, in nats a token
    local name=$1
    shift
    python finetune.py --hf-model "$folder/student" --finetune-data-files "$folder/train-$seed.jsonl" \
        --valid-data-files "$task/test.jsonl" --config scripts/quickstart/train.yaml --train-iters 120 \
        --seed "$seed" --no-save-optim --output-dir "$folder/$name-$seed" "$@" 2>"$folder/$name-$seed.log" >&2
    python - "$folder/$name-$seed/metrics.jsonl" <<'PYTHON'
import json, sys
records = [json.loads(line) for line in open(sys.argv[1])]
print(f"{[r['loss'] for r in records if r.get('split') == 'valid'][-1]:.4f}")
PYTHON
}

worse=0
printf '%-6s %-16s %-16s\n' seed "without teacher" "with teacher"
[[ $# -gt 0 ]] || set -- 1 2 3 4 5
for seed in "$@"; do
    shuf -n 150 --random-source=<(yes "$seed") "$task/train.jsonl" >"$folder/train-$seed.jsonl"
    alone=$(train alone)
    taught=$(train taught --export-kd-teacher-load "$base")
    printf '%-6s %-16s %-16s\n' "$seed" "$alone" "$taught"
    [[ $taught < $alone ]] || worse=$((worse + 1))
done
echo "held-out loss: better with the teacher on $(($# - worse)) of $# seeds"
((worse == 0))
