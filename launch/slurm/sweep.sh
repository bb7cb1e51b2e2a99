#!/usr/bin/env bash
# One task of launch/slurm/submit.sh: launch/sweep.sh for the row of this task, on the four GPUs of one machine.
#SBATCH --nodes 1
#SBATCH --gpus-per-node 4
#SBATCH --cpus-per-task 32
#SBATCH --mem 128G
#SBATCH --time 24:00:00
#SBATCH --output slurm-%x-%A_%a.log
set -euo pipefail
# SLURM runs a copy of this file.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
[ -n "${VIRTUAL_ENV:-}" ] || source .venv/bin/activate

rows=(${ROWS:-lora})
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then export METHODS=${rows[$SLURM_ARRAY_TASK_ID]}; fi
export PROCESSES=4 LAUNCH="accelerate launch --config_file launch/accelerate/multi_gpu.yaml --num_processes 4 --main_process_port 0"
bash launch/sweep.sh "$@"
