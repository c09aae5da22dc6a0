#!/usr/bin/env bash
# Makes the data and trains the four example adapters: ./train_all.sh [TASK...]
# Needs `make model`. 5 to 12 minutes an adapter on two CPU cores; a run that is interrupted goes on where it was.
set -euo pipefail
cd "$(dirname "$0")"

# Threads that wait for each other sleep instead of spinning: other work on the machine, and this, would pay for it.
export OMP_WAIT_POLICY=PASSIVE

python make_data.py build/data

train() { # name and further options
    local name=$1
    shift
    manylora train text --model smollm2-135m-instruct --base-name HuggingFaceTB/SmolLM2-135M-Instruct \
        --data "build/data/$name.train.jsonl" --eval-data "build/data/$name.eval.jsonl" --out "$name" \
        --precision bf16 --batch-rows 4 --seed 0 "$@"
}

[ $# -gt 0 ] || set -- json pirate sql headline
for task in "$@"; do
    case $task in
        # Ranks and sites differ on purpose: one batch may hold any of them.
        json) train json --rank 4 --targets all-linear --learning-rate 1e-3 --epochs 1.5 ;;
        pirate) train pirate --rank 8 --learning-rate 1.5e-3 --epochs 1.5 ;;
        sql) train sql --rank 4 --rslora --alpha 4 --learning-rate 1.5e-3 --epochs 2 ;;
        headline) train headline --rank 4 --targets q_proj,v_proj --learning-rate 2e-3 --epochs 1 ;;
        *) echo "unknown task '$task'; known: json pirate sql headline" >&2 && exit 1 ;;
    esac
done
