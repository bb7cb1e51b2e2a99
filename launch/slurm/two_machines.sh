#!/usr/bin/env bash
# Train on two machines with four GPUs each: sbatch launch/slurm/two_machines.sh [flags of train_full.py]
# Submit it from the repository's folder. Not tested on a cluster.
#SBATCH --nodes 2
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 4
#SBATCH --cpus-per-task 32
#SBATCH --mem 128G
#SBATCH --time 24:00:00
#SBATCH --output slurm-%x-%j.log
#SBATCH --open-mode append
#SBATCH --requeue
#SBATCH --signal B:USR1@300
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
[ -n "${VIRTUAL_ENV:-}" ] || source .venv/bin/activate

requeue() {
  trap '' USR1
  # To all processes that srun started. Training writes a checkpoint and ends; before its first step it does not react.
  scancel --signal USR1 "$SLURM_JOB_ID"
  for ((second = 0; second < ${GRACE:-240}; second++)); do
    kill -0 "$job" 2>/dev/null || break
    sleep 1
  done
  scontrol requeue "$SLURM_JOB_ID"
  exit 75
}
# srun runs this once on each machine, where its rank and the address of the first machine are known. The launcher ignores the
# signal; the training answers it.
srun bash -c 'trap "" USR1; accelerate launch --config_file launch/accelerate/multi_machine.yaml --machine_rank "${SLURM_NODEID:-0}" \
  --main_process_ip "${SLURM_LAUNCH_NODE_IPADDR:-127.0.0.1}" train_full.py --train_unet --resume_from_checkpoint latest "$@"' _ "$@" &
job=$!
trap requeue USR1
wait "$job"
