#!/bin/sh
# What do 128 adapters cost a float32 base when the pool keeps them in int8? Beside the same run on the base alone; what
# they cost in bfloat16 is in speed_float32.sh.
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
exec manylora bench text --model "$MODEL" --adapters 128 --rank 8 --requests 128 --prompt-tokens 64 --output-tokens 64 \
    --threads 2 --distribution uniform --resident --adapter-dtype int8 "$@"
