#!/usr/bin/env bash
# One job of launch/slurm/submit.sh: launch/sweep.sh for one row, on the four GPUs of one machine. Five minutes before the time
# limit SLURM sends SIGUSR1; the training then writes a checkpoint, and the job is queued again. Not tested on a cluster;
# tests/faults/test_faults.py runs it with stand-ins.
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

signal_tree() { # signal, process: the process and all its descendants, deepest first
  local child
  for child in $(pgrep -P "$2"); do signal_tree "$1" "$child"; done
  kill -s "$1" "$2" 2>/dev/null || true
}
requeue() {
  trap '' USR1
  # A training writes a checkpoint and ends; other steps continue for the time that is left.
  signal_tree USR1 "$job"
  for ((second = 0; second < ${GRACE:-240}; second++)); do
    kill -0 "$job" 2>/dev/null || break
    sleep 1
  done
  signal_tree TERM "$job"
  scontrol requeue "$SLURM_JOB_ID"
  exit 75
}
# Shells, launchers and all scripts but the trainings ignore the signal.
(trap '' USR1 && exec bash launch/sweep.sh "$@") &
job=$!
trap requeue USR1
wait "$job"
