#!/usr/bin/env bash
# Run the tests, after installing what they need. Flags are passed on to pytest.
#   bash tests/run.sh
#   bash tests/run.sh --slow                    # also what takes long: random kills, all rows on two processes, the demo
#   bash tests/run.sh -n 0 -k lora
#   bash tests/run.sh --lowest                  # a part of them, with the oldest versions that requirements.txt allows
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
use_environment requirements.txt tests/requirements.txt
# More threads would not speed up models this small, and two tests run at a time.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
if [ "${1:-}" = --lowest ]; then
  NEWEST_PYTHON=$(command -v python)
  export NEWEST_PYTHON
  [ -x .venv-lowest/bin/python ] || python -m venv .venv-lowest # kept; some of these versions need Python 3.12 or older
  source .venv-lowest/bin/activate
  sed -n 's/>=/==/p' requirements.txt >.venv-lowest/lowest.txt
  use_environment .venv-lowest/lowest.txt tests/requirements.txt
  files=(tests/{lowest,test_standalone,test_adapters,test_methods,test_sample,test_eval_generation,test_eval_downstream}.py)
  parts="lowest or standalone or bit_identical or adapters_load or own_call or sampled_with or lora_scale"
  parts+=" or both_models or other_readers or single_file or libraries or writes_everything or vision_features or same_results or saved_classifier"
  python -m pytest "${files[@]}" -n 2 --timeout 1500 --durations=15 -k "$parts" "${@:2}"
  exit
fi
# Files start in the order that tests/conftest.py gives, each on one worker.
python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder --timeout 1500 --durations=15 "$@"
