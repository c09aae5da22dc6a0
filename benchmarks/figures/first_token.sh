#!/bin/sh
# How much later comes the first token when its adapter was never read? 200 of them, float32 and int8 (adapters too).
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
sleep 20 # the system still clears the memory that a process before gave back, and the bench wants an idle machine
manylora bench first-token --model "$MODEL" --samples 200 --dtype float32 "$@"
sleep 20
manylora bench first-token --model "$MODEL" --samples 200 --dtype int8 --adapter-dtype int8 "$@"
