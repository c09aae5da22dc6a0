#!/usr/bin/env bash
# Draws the pictures of styles and trains their LoRAs on the icons base: ./run.sh [STYLE...]
# Needs the base (../icons/run.sh). A few minutes a style on two CPU cores; run it again after an interruption: it
# goes on where it was. `./run.sh finetune` makes the base fine-tuned on another set.
set -euo pipefail
cd "$(dirname "$0")/.." # so that `icons` and `styles` are packages

# Threads that wait for each other sleep instead of spinning: other work on the machine, and this, would pay for it.
export OMP_WAIT_POLICY=PASSIVE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
python=${PYTHON:-python}

cache=${MANYLORA_ICONS_CACHE:-$HOME/.cache/manylora}
base=${BASE:-$cache/runs/icons/pipeline}
loras=${LORAS:-$cache/runs/icons/loras}

[ -f "$base/model_index.json" ] || {
    echo "no base at $base: run examples/icons/run.sh, or 'python -m icons.export' during its training" >&2
    exit 1
}

train() { # name of the LoRA, style, further options
    local lora=$1 style=$2
    shift 2
    "$python" -m styles.make_data "$style"
    "$python" -m manylora train image --model "$base" --base-name manylora-icons \
        --data "$cache/icons/styles/$style/train" --eval-data "$cache/icons/styles/$style/held_out" \
        --out "$loras/$lora" --runs-dir "$cache/runs/icons/lora-runs" --seed 0 \
        --sample-prompts styles/prompts.txt --num-samples 16 --sample-guidance 2.5 "$@"
}

[ $# -gt 0 ] || set -- paper-cut pixel-art line-drawing neon stained-glass fluent-emoji-high-contrast fluent-emoji
for style in "$@"; do
    case $style in
        finetune)
            train finetune-fluent-emoji fluent-emoji --rank 64 --targets all --learning-rate 5e-4 --batch-rows 32 \
                --max-steps 600
            "$python" -m styles.merge
            ;;
        *) train "$style" "$style" --rank 16 --targets all --learning-rate 1e-3 --batch-rows 32 --epochs 8 ;;
    esac
done
