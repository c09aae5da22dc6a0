#!/bin/sh
# What does loading cost? The ablation is --resident: the same run with every adapter in the pool beforehand.
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
for resident in --no-resident --resident; do
    manylora bench text --model "$MODEL" --adapters 128 --requests 128 --distribution distinct "$resident" --json "$@"
done
