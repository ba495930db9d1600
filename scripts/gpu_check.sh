#!/usr/bin/env bash
# On a CUDA machine: does the GPU compute what the CPU computes, and how fast do 1B and 8B models train?
#   bash scripts/gpu_check.sh [OPTION...]          options: python scripts/gpu/check.py --help
#   bash scripts/gpu_check.sh --device cpu         tests the check itself on a machine without CUDA
#
# SFT_NO_ENV=1 takes `python` and its packages as they are instead of setting .venv up.
# Exit status: 0 all good, 1 a difference or a failed run, 2 a wrong option, 3 no CUDA device.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ${SFT_NO_ENV:-} != 1 ]]; then
    # In a function: what is sourced without arguments is given those of its caller, as extras to install.
    # shellcheck source=scripts/env.sh
    environment() { source scripts/env.sh; }
    environment
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec python scripts/gpu/check.py "$@"
