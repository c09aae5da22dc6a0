#!/bin/sh
# How does throughput fall from 1 adapter to 200 and to 2,000 that all are named alike, when the pool has room for 256?
# 384 requests, 128 of them at a time; adapters are read while others are served. 10 GB of adapters are written at first
# and taken away at the end.
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
for adapters in 1 200 2000; do
    sleep 30 # the system still clears the memory that a process before gave back, and the bench wants an idle machine
    manylora bench text --model "$MODEL" --adapters "$adapters" --rank 8 --requests 384 --prompt-tokens 64 \
        --output-tokens 64 --threads 2 --distribution uniform --pool-bytes 2200000000 "$@"
done
