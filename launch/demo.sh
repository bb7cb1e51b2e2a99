#!/usr/bin/env bash
# Run a small study, offline, in about 20 minutes on two CPU cores: draw chest phantoms, fine-tune the tiny base model
# in launch/demo/base with LoRA, DoRA and the full U-Net, sample, evaluate, and write the report.
#   bash launch/demo.sh
#   STUDY=demo/long STEPS=2000 METHODS="lora bitfit" bash launch/demo.sh --seed 1
# Run it again to continue after an interruption. Flags are passed on to the training scripts.
set -euo pipefail
cd "$(dirname "$0")/.."

export STUDY=${STUDY:-demo} METHODS=${METHODS:-lora dora unet}
STEPS=${STEPS:-200}

# Variables of launch/sweep.sh. Learning rates are high because the base model is small and the runs are short.
export MODEL=launch/demo/base RESOLUTION=128 BATCH=8 GLOBAL_BATCH=8 MIXED_PRECISION=no
export UNET_LR=${UNET_LR:-1e-3} LORA_LR=${LORA_LR:-5e-3} DORA_LR=${DORA_LR:-5e-3}
export BITFIT_LR=${BITFIT_LR:-5e-3} DIFFFIT_LR=${DIFFFIT_LR:-5e-3}
# Phantoms have several findings, as patients do, so sample the combinations of the test images.
export SAMPLING=like_test
export PROCESSES=1 LAUNCH=python ACCELERATE_USE_CPU=true HF_HUB_OFFLINE=1
export REPORT_TITLE="The demo: which fine-tuning strategy for procedural phantoms?"
# These may be set for another study.
unset VALIDATION_CSV TEST_CSV IMAGE_ROOT LABELS SPLIT_SEED UNCERTAIN PROMPT_TEMPLATE RESIZE_MODE TRAIN_IMAGES BUDGET
unset VAE_LOSS JUDGE REPORT

TRAINING=(
  --max_train_steps "$STEPS" --lr_scheduler cosine --checkpointing_steps 100
  # The base model's brightness and color follow the mean of the noise; a noise offset lets training change them.
  --noise_offset 0.2
  --validation_steps 0 --max_validation_samples 64 --num_validation_images 0
)
SAMPLES=(--num_images 384 --num_inference_steps 6 --scheduler dpmsolver++)
# The study's own classifier supplies the features; torchxrayvision's would have to be downloaded.
EVALUATION=(--features "$STUDY/downstream/real/classifier" --num_subsamples 30)
DOWNSTREAM=(
  --arch resnet18 --weights none --resolution 64 --num_train_images 300
  --learning_rate 1e-3 --train_batch_size 16 --num_train_epochs 4 --patience 0 --num_seeds 1
)
export SAMPLE_FLAGS=${SAMPLE_FLAGS:-${SAMPLES[*]}}
export EVALUATION_FLAGS=${EVALUATION_FLAGS:-${EVALUATION[*]}}
export DOWNSTREAM_FLAGS=${DOWNSTREAM_FLAGS:-${DOWNSTREAM[*]}}

source launch/environment.sh
use_environment requirements.txt

echo "== phantoms"
export TRAIN_CSV=$STUDY/phantoms/CheXpert-phantom/train.csv
[ -f "$TRAIN_CSV" ] || python launch/demo/make_phantoms.py --output_dir "$STUDY/phantoms"
# FORECAST=yes only forecasts the hours, and compares them with those of steps that are finished.
[ -z "${FORECAST:-}" ] || exec python launch/benchmark.py --study "${TRAINING[@]}" "$@"
bash launch/sweep.sh "${TRAINING[@]}" "$@"

echo "== gains over the base model"
read -ra methods <<<"$METHODS"
python launch/demo/gains.py --study "$STUDY" --methods "${methods[@]}"
echo "report: $STUDY/report/report.html"
