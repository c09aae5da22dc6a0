#!/usr/bin/env bash
# How good are the few-step pictures of the base and the LoRAs that this repository ships? Prints one JSON object:
# ./shipped.sh [OPTION of `manylora bench image`...]. What is not shipped is made first, if it is not there: the real
# pictures, from icons on npm, and the judge that is trained on them alone.
# ./shipped.sh --train [OPTION...] trains what is judged, base and LoRAs, where it is not there yet, and measures that: hours.
# Run it again after an interruption: it goes on where it was.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
python=${PYTHON:-python}
cache=${MANYLORA_ICONS_CACHE:-$HOME/.cache/manylora}

if [ "${1:-}" = --train ]; then
    shift
    "$root/examples/icons/run.sh" >&2
    "$root/examples/styles/run.sh" >&2
    "$root/examples/lcm/run.sh" distill phased >&2
    base=$cache/runs/icons/pipeline loras=$cache/runs/icons/loras
    set -- --phased phased-4,phased-2,phased-1 "$@"
else
    (
        cd "$root/examples" # so that `icons` is a package
        "$python" -m icons.icon_sets && "$python" -m icons.make_data && "$python" -u -m icons.judge
    ) >&2
    base=examples/icons/model loras=examples/icons/loras
fi
cd "$root"
exec "$python" -m manylora bench image --base "$base" --judge "$cache/runs/icons/judge/judge" \
    --data "$cache/icons/data/held_out" --guidance 2 --loras "$loras" --cache "$cache/runs/icons/bench" \
    --num-prompts 100 --num-seeds 5 --chance seeds --json --no-record "$@" # records are what run.sh keeps
