#!/bin/sh
# Is throughput flat in the number of adapters? 128 requests, each on an adapter drawn at random from 1 to 1,000.
# Resident: what is asked is the cost of computing with many, not of reading them (see loading.sh).
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
for adapters in 1 8 64 256 1000; do
    manylora bench text --model "$MODEL" --adapters "$adapters" --rank 8 --requests 128 --resident --json "$@"
done
