#!/usr/bin/env bash
# Distils the icons base's acceleration into a LoRA and measures it: ./run.sh [STEP...], STEP one of
#   sweep      the teacher's guidance: KID of its pictures at 32 steps, by scale; done before distilling
#   distill    the LoRA
#   phased     the other objective: LoRAs for 4, for 2 and for 1 step, deterministic; phased-4 and so on make one each;
#              the one for 4 also cut to rank 8
#   rank-4     the LCM-LoRA at rank 4 from the start
#   full       all weights of the UNet instead, and both measured
#   steps      few steps with and without the LoRA, beside samplers that need no training
#   close      those at 4 steps that lie near each other, for eight times the pictures
#   universal  the LoRA beside each style, and in a base fine-tuned on another set
#   ranks      the LoRA cut to smaller ranks by its singular values, beside the one of rank 4
#   weights    the map of a style's weight and the LoRA's, at 4 steps: figures, and one labelled picture
# Needs the base (../icons/run.sh); `universal` also the styles (../styles/run.sh, and that with `finetune`). Run it again
# after an interruption: it goes on where it was. RECORD=--no-record looks and keeps no row.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
python=${PYTHON:-python}

guidance=${GUIDANCE:-2} # the sweep's choice
styles=${STYLES:-paper-cut,pixel-art,fluent-emoji,fluent-emoji-high-contrast,stained-glass}
cd "${MANYLORA_ICONS_CACHE:-$HOME/.cache/manylora}" # so that what is noted of a run names no place of this machine

[ -f runs/icons/pipeline/model_index.json ] || {
    echo "no base at runs/icons/pipeline in $PWD: run examples/icons/run.sh" >&2
    exit 1
}
mkdir -p runs/icons/loras # the sweep comes before any LoRA

distill() {
    "$python" -m manylora distill runs/icons/pipeline --base-name manylora-icons --data icons/data/train \
        --guidance "$guidance" --num-steps 1000 --batch 32 --rank 16 --learning-rate 3e-4 --ema-decay 0.95 \
        --seed 0 --runs-dir runs/icons/lora-runs "$@"
}

# With one teacher step a train step takes as many passes of the UNet as one of lcm: 6 for each picture, a backward pass
# counted as two.
phased() { # steps that the LoRA is for, solver steps
    distill --objective phased --phases "$1" --num-solver-steps "$2" --teacher-steps 1 --precision bf16 \
        --learning-rate 1e-3 --out "runs/icons/loras/phased-$1"
}

cut() { # a LoRA, to a rank. Its record goes along: it says by which sampler and in how many steps it draws.
    local to=runs/icons/loras/$1-rank-$2
    "$python" -m manylora compose "$1" "$to" --adapters runs/icons/loras --method svd --rank "$2" --dtype float16
    cp "runs/icons/loras/$1/distill.json" "$to"
}

phased_4() {
    phased 4 48
    cut phased-4 8
}

made() { # of these LoRAs, those that are there, joined by commas
    local found=() name
    for name in "$@"; do
        [ ! -d "runs/icons/loras/$name" ] || found+=("$name")
    done
    (IFS=,; echo "${found[*]}")
}

bench() {
    "$python" -m manylora bench image --base runs/icons/pipeline --judge runs/icons/judge/judge --data icons/data/held_out \
        --guidance "$guidance" --loras runs/icons/loras --cache runs/icons/bench ${RECORD:---record} \
        --num-prompts 100 --chance seeds "$@" # the hundred captions are all that there are
}

[ $# -gt 0 ] || set -- sweep distill steps
for step in "$@"; do
    case $step in
        sweep) bench --table sweep --num-seeds 3 --guidances 1,1.5,2,2.5,3 ;;
        distill) distill --out runs/icons/loras/lcm ;;
        phased)
            phased_4
            phased 2 32
            phased 1 32
            ;;
        phased-4) phased_4 ;;
        phased-2) phased 2 32 ;;
        phased-1) phased 1 32 ;;
        rank-4) distill --rank 4 --out runs/icons/loras/lcm-rank-4 ;;
        full)
            distill --full --out runs/icons/pipeline-lcm
            bench --table full --num-seeds 5 --full runs/icons/pipeline-lcm
            ;;
        steps)
            bench --table steps --num-seeds 5 --train-data icons/data/train --phased "$(made phased-4 phased-2 phased-1)"
            ;;
        close)
            bench --table close --num-seeds 40 --phased "$(made phased-4 phased-4-rank-8)"
            ;;
        universal)
            names=${styles//,/ }
            PYTHONPATH=$root/examples "$python" -m icons.judge --styles $names
            bench --table universal --num-seeds 3 --style-judge runs/icons/style-judge/judge --styles "$styles" \
                --phased "$(made phased-4)" \
                --finetuned runs/icons/pipeline-finetuned --finetuned-look fluent-emoji
            ;;
        ranks)
            bench --table ranks --num-seeds 3 --phased "$(made phased-4)" --retrained "$(made lcm-rank-4)" --out runs/icons/maps
            ;;
        weights)
            bench --table weights --num-seeds 3 --style-judge runs/icons/style-judge/judge --styles "${MAPPED:-paper-cut}" \
                --out runs/icons/maps
            ;;
        *)
            echo "unknown step '$step'; known: sweep distill phased phased-4 phased-2 phased-1 rank-4 full steps close ranks weights universal" >&2
            exit 1
            ;;
    esac
done
