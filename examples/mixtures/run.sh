#!/usr/bin/env bash
# Measures which sets of LoRAs break few-step pictures of the icons base, and whether `manylora inspect` foresees it:
# ./run.sh [STEP...], STEP one of
#   loras    five LoRAs of categories, rank 8, beside the six of styles: some three minutes each on one core
#   judge    the judge of names and styles, trained on real pictures of all six styles
#   sets     160 random sets of one to eight: 25 minutes on one core; goes on where it was
#   repair   what becomes of the broken ones with the weights that `--repair` proposes
#   report   tables, thresholds and plot
# Needs the base, the LCM-LoRA and the styles (../icons, ../lcm, ../styles: run.sh paper-cut stained-glass fluent-emoji
# fluent-emoji-high-contrast neon pixel-art). SETS and PICTURES make it smaller or larger.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH=$root/examples # so that `icons`, `styles` and `mixtures` are packages

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python=${PYTHON:-python}

styles=(paper-cut stained-glass fluent-emoji fluent-emoji-high-contrast neon pixel-art)
categories=(animals food vehicles nature things)
cd "${MANYLORA_ICONS_CACHE:-$HOME/.cache/manylora}"

measure() {
    "$python" "$root/scripts/mixture_breaks.py" --base runs/icons/pipeline --loras runs/icons/loras --fast "${FAST:-lcm}" \
        --names "${styles[@]}" "${categories[@]}" --judge runs/icons/mixture-judge/judge --prompts icons/data/held_out \
        --real icons/data/held_out $(printf 'icons/styles/%s/held_out ' "${styles[@]}") \
        --num-sets "${SETS:-160}" --num-pictures "${PICTURES:-100}" "$@"
}

[ $# -gt 0 ] || set -- loras judge sets repair report
for step in "$@"; do
    case $step in
        loras)
            for name in "${categories[@]}"; do
                [ -d "icons/categories/$name" ] || "$python" -m mixtures.categories "$name"
                "$python" -m manylora train image --model runs/icons/pipeline --base-name manylora-icons \
                    --data "icons/categories/$name/train" --eval-data "icons/categories/$name/held_out" \
                    --out "runs/icons/loras/$name" --runs-dir runs/icons/lora-runs --rank 8 --targets all \
                    --learning-rate 1e-3 --batch-rows 16 --max-steps "${STEPS:-200}" --seed 0
            done
            ;;
        judge) "$python" -m icons.judge --styles "${styles[@]}" --run runs/icons/mixture-judge ;;
        sets) measure ;;
        repair) measure --repair ;;
        report) "$python" "$root/scripts/mixture_breaks_report.py" ;;
        *)
            echo "unknown step '$step'; known: loras judge sets repair report" >&2
            exit 1
            ;;
    esac
done
