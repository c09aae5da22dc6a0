#!/usr/bin/env bash
# Makes the small base model: ./run.sh. Fetches icons, draws pictures, trains the VAE, then UNet and text encoder.
# About two and a half hours on two CPU cores. Run it again after an interruption: each step goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.." # so that `icons` is a package

# Threads that wait for each other sleep instead of spinning: other work on the machine, and this, would pay for it.
export OMP_WAIT_POLICY=PASSIVE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
python=${PYTHON:-python}

"$python" -m icons.icon_sets
"$python" -m icons.make_data
"$python" -u -m icons.judge # frozen before anything that it judges is made
"$python" -u -m icons.train_vae
"$python" -m icons.latents
"$python" -u -m icons.train_base "$@"
"$python" -m icons.export
"$python" -m icons.gate
