#!/usr/bin/env bash
# The study of launch/sweep.sh on a SLURM cluster: what all rows share first, then one task of a job array for each row, then
# the report. Started again after a time limit it goes on where it was. Flags are passed on to the training scripts.
#   bash launch/slurm/submit.sh
#   STUDY=/scratch/study METHODS="unet lora" bash launch/slurm/submit.sh --max_train_steps 20000
# Not tried on a cluster: there was none where it was written.
set -euo pipefail
cd "$(dirname "$0")/../.."

export STUDY=${STUDY:-study} REPORT=no
export ROWS=${METHODS:-unet text_encoder vae unet_text_encoder unet_vae vae_text_encoder unet_vae_text_encoder lora dora bitfit difffit}
rows=($ROWS)

shared=$(METHODS='' sbatch --parsable --job-name shared launch/slurm/sweep.sh "$@")
array=$(sbatch --parsable --job-name rows --array "0-$((${#rows[@]} - 1))" --dependency "afterok:$shared" launch/slurm/sweep.sh "$@")
sbatch --job-name report --dependency "afterany:$array" --wrap "source .venv/bin/activate; python launch/report.py --study '$STUDY'"
