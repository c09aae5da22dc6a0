#!/usr/bin/env bash
# Makes the small base model: ./run.sh. Fetches icons, draws pictures, trains the VAE, then UNet and text encoder.
# About fifty minutes on two CPU cores with AMX, ninety without. Run it again after an interruption: it goes on.
set -euo pipefail
cd "$(dirname "$0")/.." # so that `icons` is a package

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
