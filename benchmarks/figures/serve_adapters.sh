#!/bin/sh
# How does a server's throughput fall from no adapter to 2,000, and what of it do the bytes of a step's adapters explain?
# The load is twice the capacity of the base alone, so every row is at its limit, with 64 requests in each step.
# 7 runs of 45 s: 8 minutes, and two more for adapters that serve_policies.sh has not left. Interrupted, the same
# command goes on.
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
exec manylora bench serve --model "$MODEL" --rows 0,1,10,100,500,1000,2000 --rank 8 --load 2 --duration-s 45 \
    --drain-s 6 --capacity-s 30 --input-range 8,32 --output-range 8,32 --serve-options "--max-num-seqs 64" \
    --adapters-folder serve-random-adapters --out serve-adapters "$@"
