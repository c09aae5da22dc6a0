#!/bin/sh
# Throughput beside transformers' generate (base alone) and PEFT's mixed batch, 128 requests, as many adapters.
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
exec manylora bench text --model "$MODEL" --adapters 128 --requests 128 --prompt-tokens 64 --output-tokens 64 \
    --distribution distinct --peer transformers,peft "$@"
