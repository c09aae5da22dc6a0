#!/usr/bin/env bash
# Draws the pictures of styles and trains their LoRAs on the icons base: ./run.sh [STYLE...]
# Needs the base (../icons/run.sh). Two minutes of drawing and some five of training a style on two CPU cores; run it
# again after an interruption: it goes on where it was. `./run.sh finetune` makes the base fine-tuned on another set.
set -euo pipefail
examples=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$examples # so that `icons` and `styles` are packages

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
python=${PYTHON:-python}

cache=${MANYLORA_ICONS_CACHE:-$HOME/.cache/manylora}
base=${BASE:-runs/icons/pipeline}
mkdir -p "$cache"
cd "$cache" # so that what a LoRA notes of its training names no place of this machine

[ -f "$base/model_index.json" ] || {
    echo "no base at $base in $cache: run examples/icons/run.sh, or 'python -m icons.export' during its training" >&2
    exit 1
}

train() { # name of the LoRA, style, further options
    local lora=$1 style=$2
    shift 2
    "$python" -m styles.make_data "$style"
    cp "$examples/styles/prompts.txt" icons/styles/
    "$python" -m manylora train image --model "$base" --base-name manylora-icons \
        --data "icons/styles/$style/train" --eval-data "icons/styles/$style/held_out" \
        --out "runs/icons/loras/$lora" --runs-dir runs/icons/lora-runs \
        --sample-prompts icons/styles/prompts.txt --num-samples 16 --sample-guidance 2 --seed 0 \
        --precision "${PRECISION:-fp32}" "$@"
}

[ $# -gt 0 ] || set -- paper-cut pixel-art fluent-emoji fluent-emoji-high-contrast
for style in "$@"; do
    case $style in
        finetune)
            train finetune-fluent-emoji fluent-emoji --rank 64 --targets all --learning-rate 5e-4 --batch-rows 32 \
                --max-steps "${STEPS:-400}"
            "$python" -m styles.merge --base "$base"
            ;;
        *)
            case $style in paper-cut | fluent-emoji) steps=300 ;; *) steps=500 ;; esac # others are further from the base
            train "$style" "$style" --rank 8 --targets all --learning-rate 1e-3 --batch-rows 32 \
                --max-steps "${STEPS:-$steps}"
            ;;
    esac
done
