#!/bin/sh
# Does a tenant that sends ten times the load of each other delay them? First-token p95 with it and without it.
# All five together send 1.5 times the capacity; the four small ones alone 0.43 times, so they need not suffer.
# 4 runs of 90 s, and half as long for what fcfs and fair leave over at the end: 9 minutes. At nine requests a second
# a small tenant sends 86: its p95 is known to lie between the 77th and the greatest, which the record gives in seconds.
# Interrupted, the same command goes on.
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
exec manylora bench serve --model "$MODEL" --adapters 200 --rank 8 --tenants 5 --hog 10 --policies fcfs,fair \
    --load 1.5 --duration-s 90 --capacity-s 30 --input-range 8,32 --output-range 8,32 \
    --serve-options "--max-num-seqs 32" --adapters-folder serve-random-adapters --out serve-fairness "$@"
