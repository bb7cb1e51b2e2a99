#!/usr/bin/env bash
# All eleven rows of the paper's Table 1, one after the other, with one latent cache; then a table of what they did.
#   bash launch/train_all.sh --max_train_steps 20000 --mixed_precision bf16
#   ROWS="lora bitfit" RUNS=runs/small bash launch/train_all.sh --resolution 256
# A finished row is skipped and an interrupted one goes on. Flags are passed on to the training scripts.
set -euo pipefail
cd "$(dirname "$0")/.."

RUNS=${RUNS:-runs}
LAUNCH=${LAUNCH:-accelerate launch}
ROWS=(${ROWS:-unet text_encoder vae unet_text_encoder unet_vae vae_text_encoder unet_vae_text_encoder lora dora bitfit difffit})

for row in "${ROWS[@]}"; do
  [ -f "$RUNS/$row/training_summary.json" ] && continue
  echo "== $row"
  case $row in
    lora | dora | bitfit | difffit) command=(train_peft.py --method "$row") ;;
    *)
      command=(train_full.py)
      [[ $row == *unet* ]] && command+=(--train_unet)
      [[ $row == *text_encoder* ]] && command+=(--train_text_encoder)
      [[ $row == *vae* ]] && command+=(--train_vae)
      ;;
  esac
  $LAUNCH "${command[@]}" --output_dir "$RUNS/$row" --resume_from_checkpoint latest "$@"
done

python launch/table.py "${ROWS[@]/#/$RUNS/}"
