#!/usr/bin/env bash
# One task of launch/slurm/submit.sh: launch/sweep.sh for the row of this task, on the four GPUs of one machine. Five minutes
# before the time limit it is told so, saves what it has, and queues up again. Tried with stand-ins for SLURM, not on a cluster.
#SBATCH --nodes 1
#SBATCH --gpus-per-node 4
#SBATCH --cpus-per-task 32
#SBATCH --mem 128G
#SBATCH --time 24:00:00
#SBATCH --output slurm-%x-%A_%a.log
#SBATCH --open-mode append
#SBATCH --requeue
#SBATCH --signal B:USR1@300
set -euo pipefail
# SLURM runs a copy of this file.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
[ -n "${VIRTUAL_ENV:-}" ] || source .venv/bin/activate

rows=(${ROWS:-lora})
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then export METHODS=${rows[$SLURM_ARRAY_TASK_ID]}; fi
export PROCESSES=4 LAUNCH="accelerate launch --config_file launch/accelerate/multi_gpu.yaml --num_processes 4 --main_process_port 0"

signal_below() { # signal, process: all processes below it, then itself
  local child
  for child in $(pgrep -P "$2"); do signal_below "$1" "$child"; done
  kill -s "$1" "$2" 2>/dev/null || true
}
requeue() {
  trap '' USR1
  # Training writes a checkpoint and ends; whatever else runs goes on for as long as there is time.
  signal_below USR1 "$job"
  for ((second = 0; second < ${GRACE:-240}; second++)); do
    kill -0 "$job" 2>/dev/null || break
    sleep 1
  done
  signal_below TERM "$job"
  scontrol requeue "$SLURM_JOB_ID"
  exit 75
}
# Ignored by shells, launchers and all scripts but those that train.
(trap '' USR1 && exec bash launch/sweep.sh "$@") &
job=$!
trap requeue USR1
wait "$job"
