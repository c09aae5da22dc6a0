#!/bin/sh
# What does each idea bring? The engine beside itself without one at a time. 32 adapters, so that each is named by
# four requests; for the one pool, memory that does not hold everything; for prefetch, an adapter for each request, so that
# they are read while others are served. onecall wants a processor with AMX here: without,
# the layers of a float32 model are no native call.
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
manylora bench text --model "$MODEL" --adapters 32 --rank 8 --requests 128 --prompt-tokens 64 --output-tokens 64 \
    --threads 2 --distribution uniform --without native,onecall,grouping,batching "$@"
manylora bench text --model "$MODEL" --adapters 32 --rank 8 --requests 128 --prompt-tokens 64 --output-tokens 64 \
    --threads 2 --distribution uniform --pool-bytes 600000000 --without unified "$@"
manylora bench text --model "$MODEL" --adapters 384 --rank 8 --requests 384 --prompt-tokens 64 --output-tokens 64 \
    --threads 2 --distribution distinct --pool-bytes 2200000000 --without prefetch "$@"
