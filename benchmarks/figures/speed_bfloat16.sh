#!/bin/sh
# speed_float32.sh's load on a base whose weights are kept in bfloat16, as checkpoints mostly are; computed in float32 all the
# same. Without peers: how fast they are in float32 does not depend on the weights.
set -eu
MODEL=${MODEL:-$HOME/.cache/manylora/models/SmolLM2-135M-Instruct-bfloat16}
here=$(cd "$(dirname "$0")" && pwd)
python "$here/../../scripts/bfloat16_checkpoint.py" "$MODEL"
exec manylora bench text --model "$MODEL" --adapters 128 --rank 8 --requests 128 --prompt-tokens 64 --output-tokens 64 \
    --threads 2 --distribution uniform --resident "$@"
