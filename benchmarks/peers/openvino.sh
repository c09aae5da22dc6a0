#!/bin/sh
# OpenVINO GenAI as a peer of `manylora bench text`, and optimum-intel, which exports the model for it. 2 GB.
# torch of CPU builds: from PyTorch's index of them, or another place that has them (environment.sh: PIP_ARGS).
set -eu
. "$(dirname "$0")/environment.sh"
begin_environment openvino
# Without dependencies: optimum-intel asks for torchvision too, and exports nothing where that is installed.
install --no-deps --requirement "$here/openvino.txt"
"$environment/bin/python" -c 'import openvino_genai, optimum.intel'
end_environment "openvino-genai 2026.4.1.0, optimum-intel 2.2.0"
