#!/bin/sh
# How much later comes the first token when its adapter was never read? 200 of them, float32 and int8.
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
for dtype in float32 int8; do
    sleep 20 # the system still clears the memory that a process before gave back, and the bench wants an idle machine
    manylora bench first-token --model "$MODEL" --samples 200 --dtype "$dtype" "$@"
done
