#!/usr/bin/env bash
# Run the study of launch/sweep.sh on a SLURM cluster: a job for what all rows share and the first row, then a job array with one
# task for each other row, then the report. Submit it again to continue. Flags are passed on to the training scripts.
#   bash launch/slurm/submit.sh
#   STUDY=/scratch/study METHODS="unet lora" bash launch/slurm/submit.sh --max_train_steps 20000
# If the first job fails, the jobs that wait for it never start: cancel them and submit again. Not tested on a cluster.
set -euo pipefail
cd "$(dirname "$0")/../.."

export STUDY=${STUDY:-study} REPORT=no
export ROWS=${METHODS:-unet text_encoder vae unet_text_encoder unet_vae vae_text_encoder unet_vae_text_encoder lora dora bitfit difffit}
rows=($ROWS)

# The first row fills the caches that all rows share, before the others start together.
last=$(METHODS=${rows[0]} sbatch --parsable --job-name first launch/slurm/sweep.sh "$@")
if ((${#rows[@]} > 1)); then
  last=$(sbatch --parsable --job-name rows --array "1-$((${#rows[@]} - 1))" --dependency "afterok:$last" launch/slurm/sweep.sh "$@")
fi
METHODS='' REPORT=yes sbatch --job-name report --dependency "afterany:$last" --gpus-per-node 0 --time 02:00:00 launch/slurm/sweep.sh
