#!/usr/bin/env bash
# The comparison in small, offline, on a CPU: BitFit, LoRA and the full U-Net on procedural chest phantoms, from the tiny base
# in launch/demo/base. Run again, it goes on where it was. Flags are passed on to the training scripts.
set -euo pipefail
cd "$(dirname "$0")/.."

DEMO_DIR=${DEMO_DIR:-demo}
STEPS=${STEPS:-500}
IMAGES=${IMAGES:-4}
METHODS=(${METHODS:-bitfit lora unet})
BASE=launch/demo/base
CSV=$DEMO_DIR/phantoms/CheXpert-phantom/train.csv

source launch/environment.sh
use_environment requirements.txt
# The models are too small to gain from more threads, and on a busy machine these wait for each other.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
launch() { accelerate launch --quiet --config_file launch/accelerate/cpu.yaml "$@"; }

echo "== phantoms"
python launch/demo/make_phantoms.py --output_dir "$DEMO_DIR/phantoms"

for method in "${METHODS[@]}"; do
  run=$DEMO_DIR/runs/$method
  [ -f "$run/training_summary.json" ] && continue
  echo "== train $method"
  # Larger rates than at full size: the base is small and the runs are short.
  case $method in
    unet) script=train_full.py; flags=(--train_unet --unet_lr 1e-3) ;;
    lora | dora) script=train_peft.py; flags=(--method "$method" --learning_rate 5e-3) ;;
    *) script=train_peft.py; flags=(--method "$method" --learning_rate 1e-2) ;;
  esac
  # Without the noise offset, the mean of the first noise goes on deciding brightness and colour, as the base has learnt it.
  launch $script "${flags[@]}" --data_csv "$CSV" --pretrained_model_name_or_path $BASE --output_dir "$run" \
    --resolution 128 --train_batch_size 8 --gradient_accumulation_steps 1 --max_train_steps "$STEPS" --noise_offset 0.2 \
    --validation_steps 0 --checkpointing_steps 200 --resume_from_checkpoint latest "$@"
done

for model in "$BASE" "${METHODS[@]/#/$DEMO_DIR/runs/}"; do
  echo "== sample $model"
  launch sample.py --model "$model" --images_per_label "$IMAGES" --num_inference_steps 25 --output_dir "$DEMO_DIR/samples/$(basename "$model")"
done

echo "== compare"
python launch/demo/compare.py --demo_dir "$DEMO_DIR" --models base "${METHODS[@]}"
