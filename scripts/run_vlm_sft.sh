#!/usr/bin/env bash
# Starts a named configuration with its log and its output under a time stamp, as RLinf's tutorial does.
#   bash scripts/run_vlm_sft.sh [NAME] [key=value ...] [flags of finetune.py]
#
# NAME (default robo2vlm) is a file of CONFIG_PATH (default scripts/conf/vlm) without its ending. PROCESSES
# (default: one a GPU, or one) are started, LOGS (default logs) gets a folder of this time. To go on after a
# stop, give what it holds: --output-dir logs/TIME/NAME.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=robo2vlm
if [[ $# -gt 0 && $1 != -* && $1 != *=* ]]; then
    name=$1
    shift
fi
overrides=()
while [[ $# -gt 0 && $1 != -* ]]; do
    overrides+=("$1")
    shift
done
folder="${LOGS:-logs}/$(date +%Y%m%d-%H%M%S)"
log="$folder/run_vlm_sft.log"
mkdir -p "$folder"
command=(python scripts/launch.py ${PROCESSES:+--nproc-per-node "$PROCESSES"} finetune.py
    --config-path "${CONFIG_PATH:-scripts/conf/vlm}" --config-name "$name" "${overrides[@]}"
    --output-dir "$folder/$name" "$@")
# The launcher takes this process's place, and signals; what writes the log hears none, or the save would
# have nobody to print to.
exec > >(trap '' INT TERM HUP && exec tee "$log") 2>&1
echo "${command[*]}"
exec "${command[@]}"
