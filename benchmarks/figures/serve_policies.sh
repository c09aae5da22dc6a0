#!/bin/sh
# Which policy keeps most first tokens within 6 s, at half, all and twice the capacity, with 200 and 2,000 adapters?
# lifo and abort (S-LoRA's) are the bench's own, to compare with. Two hours.
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
for adapters in 200 2000; do
    manylora bench serve --model "$MODEL" --adapters "$adapters" --rank 8 --policies fcfs,cluster,fair,slo,lifo,abort \
        --load 0.5,1,2 --duration-s 120 --input-range 8,64 --output-range 8,64 --out "serve-policies-$adapters" "$@"
done
