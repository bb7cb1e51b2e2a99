#!/usr/bin/env bash
# The whole study in small, offline, on a CPU: LoRA, DoRA and the full U-Net on procedural chest phantoms, from the tiny base
# in launch/demo/base; samples, Tables 1 to 4, and the report. Run again, it goes on where it was. Flags are passed on to the
# training scripts; what stands below as ${VARIABLE:-default} can be set from outside.
set -euo pipefail
cd "$(dirname "$0")/.."

# What a shell has set for a study of its own is not the demo's.
unset VALIDATION_CSV TEST_CSV IMAGE_ROOT LABELS SPLIT_SEED UNCERTAIN PROMPT_TEMPLATE RESIZE_MODE TRAIN_IMAGES BUDGET VAE_LOSS JUDGE
export REPORT_TITLE="The demo: which fine-tuning strategy for procedural phantoms?"
export STUDY=${STUDY:-demo} METHODS=${METHODS:-lora dora unet} MODEL=launch/demo/base
STEPS=${STEPS:-200}
# Larger rates than at full size: the base is small and the runs are short.
export UNET_LR=${UNET_LR:-1e-3} LORA_LR=${LORA_LR:-5e-3} DORA_LR=${DORA_LR:-5e-3} BITFIT_LR=${BITFIT_LR:-5e-3} DIFFFIT_LR=${DIFFFIT_LR:-5e-3}
# One process each, so without accelerate's launcher; on the CPU, since three trainings would share a GPU.
export PROCESSES=1 LAUNCH=python ACCELERATE_USE_CPU=true RESOLUTION=128 BATCH=8 GLOBAL_BATCH=8 MIXED_PRECISION=no
export SAMPLE_FLAGS=${SAMPLE_FLAGS:---images_per_label 64 --num_inference_steps 6 --scheduler dpmsolver++}
# The classifier's features, since torchxrayvision's have to be downloaded.
export EVALUATION_FLAGS=${EVALUATION_FLAGS:---features $STUDY/downstream/real/classifier --max_per_label 64 --num_subsamples 30}
export DOWNSTREAM_FLAGS=${DOWNSTREAM_FLAGS:---arch resnet18 --weights none --resolution 64 --learning_rate 1e-3 --train_batch_size 16 --num_train_epochs 4 --num_train_images 300 --patience 0 --num_seeds 1}

source launch/environment.sh
use_environment requirements.txt
export HF_HUB_OFFLINE=1

echo "== phantoms"
python launch/demo/make_phantoms.py --output_dir "$STUDY/phantoms"
export TRAIN_CSV=$STUDY/phantoms/CheXpert-phantom/train.csv
# Without the noise offset, the mean of the first noise goes on deciding brightness and colour, as the base has learnt it. With
# a constant rate as high as these, how good a model is depends on the step that happens to be the last.
set -- --max_train_steps "$STEPS" --lr_scheduler cosine --noise_offset 0.2 --validation_steps 0 --max_validation_samples 64 --num_validation_images 0 --checkpointing_steps 100 "$@"
sweeps() { # flags of the trainings; on stdin a line for each sweep, with its variables
  # Side by side with one thread each: no core waits while another of them reads, writes or starts.
  REPORT=no OMP_NUM_THREADS=1 xargs -P 4 -I @SWEEP@ env -S @SWEEP@ bash launch/sweep.sh "$@" || {
    echo "launch/demo.sh: error: a row failed, as said above; started again, the demo goes on where it was" >&2
    exit 1
  }
}
# The base model is the longest way here, so it has a core to itself before the rows' trainings and samples have it; then the
# rows are judged, which takes what the base has left.
rows=($(printf '%s\n' $METHODS | sort -u))
{ echo METHODS=; printf 'METHODS=%s JUDGE=no nice\n' "${rows[@]}"; } | sweeps "$@"
printf 'METHODS=%s\n' "${rows[@]}" | sweeps "$@"
REPORT=yes bash launch/sweep.sh "$@"

echo "== gains over the base model"
python launch/demo/gains.py --study "$STUDY" --methods $METHODS
echo "report: $STUDY/report/report.html"
