#!/bin/sh
# What does a step cost, by bytes, operations and places? Three models' steps: two to fit the costs, the third, larger
# one to see whether they hold for a model that was not in the fit. Then: python scripts/step_cost.py
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
here=$(cd "$(dirname "$0")" && pwd)
models=$(mktemp -d)
trap 'rm -rf "$models"' EXIT
manylora bench steps --model "$MODEL" "$@"
for sizes in random-60m random-360m; do
    python "$here/../../scripts/random_model.py" "$sizes" "$models/$sizes"
    manylora bench steps --model "$models/$sizes" --batch 1,4,16,64,128 --context 64,512,2048 --rank 8,32,128 \
        --repeats 2 "$@"
done
