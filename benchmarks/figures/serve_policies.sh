#!/bin/sh
# Which policy keeps most first tokens within 6 s, at half, all and twice the capacity, with 200 and 2,000 adapters?
# lifo and abort (S-LoRA's) are the bench's own, to compare with. 32 at a time, about as many as S-LoRA's pool holds on
# an A10G, so that an overloaded server has a queue within seconds.
# 36 runs of 40 s and 2 of 30 s: 34 minutes, adapters aside (two minutes the first time, 10 GB). At nine requests a second
# a row has 180, 360 or 720 of them; a share of 70 % of 720 is known to within 3.4 points, and all rows of a load have
# the same trace. Interrupted, the same command goes on; the rows that are there are not measured again.
set -eu
MODEL=${MODEL:-smollm2-135m-instruct}
for adapters in 200 2000; do
    if [ "$adapters" = 200 ] && [ -e serve-policies-2000/unfinished.jsonl ]; then continue; fi
    manylora bench serve --model "$MODEL" --adapters "$adapters" --rank 8 --policies fcfs,cluster,fair,slo,lifo,abort \
        --load 0.5,1,2 --duration-s 40 --drain-s 6 --capacity-s 30 --input-range 8,32 --output-range 8,32 \
        --serve-options "--max-num-seqs 32" --adapters-folder serve-random-adapters \
        --out "serve-policies-$adapters" "$@"
done
