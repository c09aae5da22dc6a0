#!/bin/sh
# Does a tenant that sends ten times the load of each other delay them? First-token p95 with it and without it.
# All five together send 1.5 times the capacity; the four small ones alone 0.43 times, so they need not suffer.
# Twenty minutes.
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
exec manylora bench serve --model "$MODEL" --adapters 200 --rank 8 --tenants 5 --hog 10 --policies fcfs,fair \
    --load 1.5 --duration-s 120 --input-range 8,64 --output-range 8,64 --out serve-fairness "$@"
