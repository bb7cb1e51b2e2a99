#!/usr/bin/env bash
# All tests, with everything they need: bash tests/run.sh [pytest's own flags]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
use_environment requirements.txt tests/requirements.txt
# The models of the tests are too small to gain from more threads, and two processes share the cores.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# Two files of tests at a time, begun in the order that tests/conftest.py gives; `-n 0` for one after the other.
python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --timeout 1500 --durations=15 "$@"
