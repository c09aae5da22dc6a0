#!/bin/sh
# How does a server's throughput fall from no adapter to 2,000, and what of it do the bytes of a step's adapters explain?
# The load is the capacity of the base alone, so every row but the first is at its limit. Half an hour.
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
exec manylora bench serve --model "$MODEL" --rows 0,1,10,100,500,1000,2000 --rank 8 --load 1 --duration-s 120 \
    --input-range 8,64 --output-range 8,64 --out serve-adapters "$@"
