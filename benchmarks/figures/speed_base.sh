#!/bin/sh
# No adapters. Our base in float32 beside those who serve the base alone, in float32 (and llama.cpp's Q8_0); then in int8
# beside the fastest of them and llama.cpp's Q8_0. First: benchmarks/peers/openvino.sh, vllm_cpu.sh and llama_cpp.sh
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
base() {
    manylora bench text --model "$MODEL" --adapters 0 --requests 128 --prompt-tokens 64 --output-tokens 64 --threads 2 "$@"
}
base --dtype float32 --peer openvino,vllm-cpu,llama-cpp,llama-cpp-q8_0,transformers "$@"
base --dtype int8 --peer openvino,llama-cpp-q8_0 "$@"
