#!/bin/sh
# Does a mixture cost more than its ranks? Three adapters of rank 8 a request, beside one of rank 24.
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
manylora bench text --model "$MODEL" --adapters 64 --requests 64 --mixture 3 --rank 8 --resident --json "$@"
manylora bench text --model "$MODEL" --adapters 64 --requests 64 --mixture 1 --rank 24 --resident --json "$@"
