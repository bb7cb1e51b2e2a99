#!/usr/bin/env bash
# The study of launch/sweep.sh on a SLURM cluster: what all rows share and the first row, then one task of a job array for each
# other row, then the report. Started again after a time limit it goes on where it was. Flags are passed on to the training scripts.
#   bash launch/slurm/submit.sh
#   STUDY=/scratch/study METHODS="unet lora" bash launch/slurm/submit.sh --max_train_steps 20000
# If the first job fails, those that wait for it never start: cancel them, and start again.
# Not tried on a cluster: there was none where it was written.
set -euo pipefail
cd "$(dirname "$0")/../.."

export STUDY=${STUDY:-study} REPORT=no
export ROWS=${METHODS:-unet text_encoder vae unet_text_encoder unet_vae vae_text_encoder unet_vae_text_encoder lora dora bitfit difffit}
rows=($ROWS)

# The first job also does the first row, so that the caches which all rows share are there before the others start together.
ends=$(METHODS=${rows[0]} sbatch --parsable --job-name first launch/slurm/sweep.sh "$@")
if ((${#rows[@]} > 1)); then
  ends=$(sbatch --parsable --job-name rows --array "1-$((${#rows[@]} - 1))" --dependency "afterok:$ends" launch/slurm/sweep.sh "$@")
fi
METHODS='' REPORT=yes sbatch --job-name report --dependency "afterany:$ends" --gpus-per-node 0 --time 02:00:00 launch/slurm/sweep.sh
