#!/bin/sh
# What do adapters cost when all requests name the same one? Beside the same run on the base alone.
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
exec manylora bench text --model "$MODEL" --adapters 128 --rank 8 --requests 128 --prompt-tokens 64 --output-tokens 64 \
    --threads 2 --distribution identical --resident "$@"
