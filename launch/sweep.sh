#!/usr/bin/env bash
# Run the whole study: train each row of the paper's Table 1, sample from it, evaluate it (Tables 3 and 4), and report.
#   bash launch/sweep.sh
#   METHODS="lora bitfit" STUDY=study/small RESOLUTION=256 bash launch/sweep.sh --max_train_steps 2000
#   TRAIN_CSV=train.csv VALIDATION_CSV=val.csv TEST_CSV=test.csv IMAGE_ROOT=xrays bash launch/sweep.sh
#   BUDGET=authors bash launch/sweep.sh
#   SEEDS="0 1 2" bash launch/sweep.sh
#   MODEL=sd15-fp16 MODEL_FLAGS="--variant fp16" METHODS=lora bash launch/sweep.sh
# Finished steps are skipped and interrupted ones continue. Flags are passed on to the training scripts. Variables can
# be set in the environment. Paths are relative to the repository.
set -euo pipefail
cd "$(dirname "$0")/.."

# Folder of the results, base model, and rows to run.
STUDY=${STUDY:-study}
MODEL=${MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}
MODEL_FLAGS=(${MODEL_FLAGS:-}) # --variant and --revision of MODEL
ALL_METHODS="unet text_encoder vae unet_text_encoder unet_vae vae_text_encoder unet_vae_text_encoder"
ALL_METHODS+=" lora dora bitfit difffit"
METHODS=(${METHODS-$ALL_METHODS})
# Train each row once per seed, so that the report can tell strategies from single trainings. Seed 0 writes runs/lora,
# seed 1 writes runs/lora_seed1, and so on. Seeds can be added to a finished study.
SEEDS=(${SEEDS:-0})
# Number of processes, and the command that starts them. Without a number, accelerate would use all GPUs, and a step
# would take more images.
PROCESSES=${PROCESSES:-1}
LAUNCH=${LAUNCH:-accelerate launch --num_processes $PROCESSES}

# One table, which the scripts split by patient; or, with TEST_CSV, three ready-made tables, used in full.
TRAIN_CSV=${TRAIN_CSV:-CheXpert-v1.0/train.csv} # or CheXpert-v1.0-small/train.csv
VALIDATION_CSV=${VALIDATION_CSV:-}
TEST_CSV=${TEST_CSV:-}
IMAGE_ROOT=${IMAGE_ROOT:-}
# Label columns to sample and evaluate. If all are among CheXpert's 14, training prompts name each of the 14 that the
# table has, else only these.
IFS=, read -ra LABELS <<<"${LABELS:-Cardiomegaly,Lung Opacity,Edema,No Finding,Pneumothorax,Pleural Effusion}"
LABELS=("${LABELS[@]# }")
# Settings that all scripts must agree on.
SPLIT_SEED=${SPLIT_SEED:-0}
UNCERTAIN=${UNCERTAIN:-ignore}
PROMPT_TEMPLATE=${PROMPT_TEMPLATE:-Chest X-ray of a subject with {\}}

# The paper's recipe, completed from its authors' code.
RESOLUTION=${RESOLUTION:-512}
RESIZE_MODE=${RESIZE_MODE:-squash}
TRAIN_IMAGES=${TRAIN_IMAGES:-20000}
EPOCHS=${EPOCHS:-100}
declare -A RATE=(
  [unet]=${UNET_LR:-1e-5} [text_encoder]=${TEXT_ENCODER_LR:-1e-6} [vae]=${VAE_LR:-1e-6}
  [lora]=${LORA_LR:-1e-4} [dora]=${DORA_LR:-1e-4} [bitfit]=${BITFIT_LR:-1e-4} [difffit]=${DIFFFIT_LR:-1e-4}
)
OPTIMIZER=(--lr_scheduler constant --max_grad_norm 1.0)
OPTIMIZER+=(--adam_beta1 0.9 --adam_beta2 0.999 --adam_weight_decay 1e-2 --adam_epsilon 1e-8)
ADAPTER=(--rank 8 --lora_alpha 16 --lora_dropout 0)
VAE_LOSS=${VAE_LOSS:-anchored} # joint is the paper's; the README says why it is not the default
MIXED_PRECISION=${MIXED_PRECISION:-bf16} # the paper's is fp16; bf16 needs no loss scaling; no on a CPU
# equal: GLOBAL_BATCH images per step (the paper's 4 GPUs x batch 4 x 4 accumulated) and as many steps for each row.
# authors: twice the batch and half the steps for PEFT rows, as in the authors' code.
BUDGET=${BUDGET:-equal}
GLOBAL_BATCH=${GLOBAL_BATCH:-64}
BATCH=${BATCH:-4}

# labels: the same number of images for each single label, as in the paper; FID leaves out real images with several.
# like_test: the test images' combinations of labels; FID also uses real images with several.
SAMPLING=${SAMPLING:-labels}
[ "$SAMPLING" = like_test ] && number="--num_images 30000" || number="--images_per_label 5000"
SAMPLE_FLAGS=(${SAMPLE_FLAGS:-$number --num_inference_steps 50 --guidance_scale 7.5})
# Fewer subsamples would leave few of the 66 pairs of 12 models significant after Holm's correction.
EVALUATION_FLAGS=(${EVALUATION_FLAGS:---max_per_label 5000 --num_subsamples 30})
DOWNSTREAM_FLAGS=(${DOWNSTREAM_FLAGS:---arch efficientnet_b0 --weights imagenet --num_seeds 3})
REPORT_TITLE=${REPORT_TITLE:-}
# JUDGE=no only trains and samples the rows; a later call can add the base model and the evaluations.
JUDGE=${JUDGE:-yes}
REPORT=${REPORT:-yes}

refuse() {
  echo "launch/sweep.sh: error: $1" >&2
  exit 2
}

one_of() { # variable's name, allowed values
  [[ " ${*:2} " == *" ${!1} "* ]] || refuse "$1=${!1} is none of: ${*:2}"
}

# Ignore case, spaces and underscores in column names, as the scripts do.
simplify() {
  tr ';|\t' ',,,' <<<"$1" | tr -d ' _"\r' | tr '[:upper:]' '[:lower:]'
}

# Check now what would otherwise fail after hours.
for name in METHOD SEED LABEL; do
  [ -z "${!name:-}" ] || refuse "$name is set, but the variable is called ${name}S"
done
for table in "$TRAIN_CSV" ${TEST_CSV:+"$TEST_CSV" "$VALIDATION_CSV"}; do
  [ -f "$table" ] ||
    refuse "no table '$table'; set TRAIN_CSV (with TEST_CSV also VALIDATION_CSV), or try bash launch/demo.sh"
  columns=$(simplify "$(zcat -f "$table" | head -n 1)")
  for label in "${LABELS[@]}"; do
    [[ ",$columns," == *",$(simplify "$label"),"* ]] ||
      refuse "$table has no column '$label'; set LABELS to columns of all tables, such as LABELS='Edema,No Finding'"
  done
done
[ -z "$VALIDATION_CSV" ] || [ -n "$TEST_CSV" ] ||
  refuse "VALIDATION_CSV is set and TEST_CSV is not; set both, for three ready-made tables, or neither"
[ -z "$IMAGE_ROOT" ] || [ -d "$IMAGE_ROOT" ] || refuse "no folder IMAGE_ROOT=$IMAGE_ROOT"
for row in "${METHODS[@]}"; do
  [[ " $ALL_METHODS " == *" $row "* ]] || refuse "METHODS: '$row' is not one of $ALL_METHODS"
done
one_of BUDGET equal authors
one_of SAMPLING labels like_test
one_of UNCERTAIN ones ignore
one_of RESIZE_MODE squash pad crop
one_of VAE_LOSS anchored joint
one_of MIXED_PRECISION no fp16 bf16
one_of JUDGE yes no
one_of REPORT yes no
((GLOBAL_BATCH % (BATCH * PROCESSES) == 0)) ||
  refuse "GLOBAL_BATCH=$GLOBAL_BATCH is not a multiple of BATCH=$BATCH x PROCESSES=$PROCESSES; change one of them"
[[ "${SEEDS[*]}" =~ ^[0-9\ ]+$ ]] || refuse "SEEDS='${SEEDS[*]}' is no list of numbers such as '0 1 2'"
for flag in "$@"; do
  case $flag in
    --seed | --seed=*) ((${#SEEDS[@]} == 1)) || refuse "--seed cannot be passed when SEEDS has several values" ;;
    --split* | --uncertain* | --prompt_template* | --resolution* | --resize_mode* | --max_train_samples* | \
      --data_csv* | --validation_csv* | --dataset_name* | --image_root* | --output_dir* | \
      --pretrained_model_name_or_path* | --train_batch_size* | --variant* | --revision*)
      refuse "${flag%%=*} must be the same in all scripts; set a variable at the top of launch/sweep.sh instead" ;;
    --*) grep -q "\"${flag%%=*}\"" train_*.py || refuse "no training script has a flag ${flag%%=*}" ;;
  esac
done

named=()
for label in "${LABELS[@]}"; do
  grep -A 3 "^LABELS = " train_full.py | grep -q "[\",]$label[\",]" || named=(--labels "${LABELS[@]}")
done
# The data flags of training, eval_generation.py and eval_downstream.py.
if [ -n "$TEST_CSV" ]; then
  training_data=(--data_csv "$TRAIN_CSV" --validation_csv "$VALIDATION_CSV")
  generation_data=(--real_csv "$TEST_CSV" --real_split all --train_csv "$TRAIN_CSV" --train_split all)
  downstream_data=(--real_csv "$TRAIN_CSV" --validation_csv "$VALIDATION_CSV" --test_csv "$TEST_CSV")
  prompts=(--like_csv "$TEST_CSV")
else
  training_data=(--data_csv "$TRAIN_CSV")
  generation_data=(--real_csv "$TRAIN_CSV" --train_csv "$TRAIN_CSV")
  downstream_data=(--real_csv "$TRAIN_CSV")
  prompts=(--like_csv "$TRAIN_CSV" --split test --split_seed "$SPLIT_SEED")
fi
training_data+=("${named[@]}")
[ "$SAMPLING" = like_test ] && prompts+=(--uncertain "$UNCERTAIN" "${named[@]}") || prompts=(--labels "${LABELS[@]}")
shared=(--split_seed "$SPLIT_SEED" --uncertain "$UNCERTAIN" --resize_mode "$RESIZE_MODE")
[ -z "$IMAGE_ROOT" ] || shared+=(--image_root "$IMAGE_ROOT")

unless() { # last file that a step writes, command and arguments of the step
  [ -f "$STUDY/$1" ] && return
  echo "== $1"
  "${@:2}"
}

train() { # row, name, further flags
  local row=$1 batch=$BATCH global_batch=$GLOBAL_BATCH command
  case $row in
    lora | dora | bitfit | difffit)
      command=(train_peft.py --method "$row" --learning_rate "${RATE[$row]}" "${ADAPTER[@]}")
      [ "$BUDGET" = authors ] && batch=$((2 * BATCH)) global_batch=$((2 * GLOBAL_BATCH))
      ;;
    *)
      command=(train_full.py --vae_loss "$VAE_LOSS")
      for part in unet text_encoder vae; do
        [[ $row == *$part* ]] && command+=("--train_$part" "--${part}_lr" "${RATE[$part]}")
      done
      ;;
  esac
  $LAUNCH "${command[@]}" "${training_data[@]}" "${shared[@]}" \
    --pretrained_model_name_or_path "$MODEL" "${MODEL_FLAGS[@]}" --output_dir "$STUDY/runs/$2" \
    --prompt_template "$PROMPT_TEMPLATE" --resolution "$RESOLUTION" --max_train_samples "$TRAIN_IMAGES" \
    --num_train_epochs "$EPOCHS" --train_batch_size "$batch" \
    --gradient_accumulation_steps $((global_batch / (batch * PROCESSES))) --mixed_precision "$MIXED_PRECISION" \
    "${OPTIMIZER[@]}" --resume_from_checkpoint latest "${@:3}"
}

sample() { # model, name, further flags
  $LAUNCH sample.py --model "$1" "${prompts[@]}" --prompt_template "$PROMPT_TEMPLATE" \
    --resolution "$RESOLUTION" "${SAMPLE_FLAGS[@]}" --output_dir "$STUDY/samples/$2" "${@:3}"
}

classify() { # name, further flags
  $LAUNCH eval_downstream.py "${downstream_data[@]}" "${shared[@]}" --labels "${LABELS[@]}" "${DOWNSTREAM_FLAGS[@]}" \
    --output_dir "$STUDY/downstream/$1" "${@:2}"
}

compare() { # name
  $LAUNCH eval_generation.py --synthetic "$STUDY/samples/$1" "${generation_data[@]}" "${shared[@]}" \
    --max_train_samples "$TRAIN_IMAGES" --labels "${LABELS[@]}" --classifier "$STUDY/downstream/real/classifier" \
    --baseline "$STUDY/samples/base" --vae "$MODEL" "${MODEL_FLAGS[@]}" "${EVALUATION_FLAGS[@]}" \
    --output_dir "$STUDY/evaluations/$1"
}

evaluate() { # name: base, a row, or a row with a seed
  unless "evaluations/$1/generation_metrics.json" compare "$1"
  unless "downstream/$1/downstream_metrics.json" \
    classify "$1" --synthetic "$STUDY/samples/$1" --reference "$STUDY/downstream/real"
}

# A classifier trained on as many real images as there are samples is the reference for those trained on samples
# (Table 4), and tells whether an image shows its prompt (Table 3). Rows are also compared with the base model.
if [ "$JUDGE" != no ]; then
  unless samples/base/metadata.csv sample "$MODEL" base "${MODEL_FLAGS[@]}"
  unless downstream/real/downstream_metrics.json classify real --synthetic "$STUDY/samples/base" --train_on real
  evaluate base
fi
for seed in "${SEEDS[@]}"; do
  for row in "${METHODS[@]}"; do
    name=$row
    [ "$seed" = 0 ] || name+=_seed$seed
    unless "runs/$name/training_summary.json" train "$row" "$name" --seed "$seed" "$@"
    unless "samples/$name/metadata.csv" sample "$STUDY/runs/$name" "$name"
    [ "$JUDGE" = no ] || evaluate "$name"
  done
done
[ "$REPORT" = no ] || python launch/report.py --study "$STUDY" ${REPORT_TITLE:+--title "$REPORT_TITLE"}
