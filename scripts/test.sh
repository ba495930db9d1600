#!/usr/bin/env bash
# Runs the tests, setting up the environment first where needed.
#   bash scripts/test.sh                    the whole suite
#   bash scripts/test.sh tests/data -x      any arguments of pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh dev lora ray wandb mlflow

# Tests start several processes; one thread each keeps them from fighting over the cores.
export OMP_NUM_THREADS=1
# Two at a time, unless the arguments say how many.
[[ " $* " == *" -n"* || " $* " == *" --numprocesses"* ]] || set -- -n 2 "$@"
exec python -m pytest "$@"
