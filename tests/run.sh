#!/usr/bin/env bash
# Run the tests, after installing what they need. Flags are passed on to pytest.
#   bash tests/run.sh
#   bash tests/run.sh --slow                    # also what takes long: random kills, all rows on two processes, the demo
#   bash tests/run.sh -n 0 -k lora
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
use_environment requirements.txt tests/requirements.txt
# More threads would not speed up models this small, and two tests run at a time.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# Files start in the order that tests/conftest.py gives, each on one worker.
python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --timeout 1500 --durations=15 "$@"
