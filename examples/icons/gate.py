"""Is there something to distil? python -m icons.gate, before any distilling.

A base that recalls one picture per caption flows along nearly straight lines: plain DDIM in 1 or 2 steps is then as
good as in 32, and an acceleration LoRA has nothing to add. So the base's own results at few steps are held against its
result at 32 from the same noise and at the same guidance: mean squared error of latents, which have unit variance, with
95 % bootstrap intervals over pictures. The gate is open when the intervals of 1, 2 and 4 steps lie above `--bound`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor

from icons.folders import DATA_FOLDER, RUNS_FOLDER
from icons.image_folder import read_metadata, save_grid, to_bytes
from icons.student import starting_noise
from manylora.training.aside import write_text_aside

STEPS = (1, 2, 4, 8)
MANY_STEPS = 32
BATCH = 32


@dataclass(frozen=True)
class GateRow:
    """One setting of the sampler against 32 steps."""

    steps: int
    guidance: float
    latent_mse: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    num_pictures: int


def sample_latents(
    pipeline: StableDiffusionPipeline, captions: Sequence[str], noise: Tensor, steps: int, guidance: float
) -> Tensor:
    """Return the latents [N, 4, 16, 16] that DDIM makes of the noise; guidance 1 is off."""
    parts = [slice(start, start + BATCH) for start in range(0, len(captions), BATCH)]
    return torch.cat(
        [
            pipeline(
                list(captions[part]),
                latents=noise[part],
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="latent",
            ).images
            for part in parts
        ]
    )


def mean_interval(values: NDArray[np.float64], seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of values [N]."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def measure(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    guidances: Sequence[float],
    picture: Path | None = None,
    many_steps: int = MANY_STEPS,
) -> list[GateRow]:
    """Compare few steps with many, for each guidance; draws the first pictures, a row for each number of steps."""
    noise = starting_noise(len(captions), seed=1)
    rows, shown = [], []
    for guidance in guidances:
        many = sample_latents(pipeline, captions, noise, many_steps, guidance)
        for steps in STEPS:
            few = sample_latents(pipeline, captions, noise, steps, guidance)
            errors = ((few - many) ** 2).mean(dim=(1, 2, 3)).double().numpy()
            low, high = mean_interval(errors)
            rows.append(GateRow(steps, guidance, float(errors.mean()), low, high, len(captions)))
            shown.append(few[:16])
        shown.append(many[:16])
    if picture is not None:
        with torch.no_grad():
            decoded = pipeline.vae.decode(torch.cat(shown)).sample
        save_grid(to_bytes(decoded), min(16, len(captions)), picture)
    return rows


def is_open(rows: Sequence[GateRow], bound: float) -> bool:
    """Return whether 1, 2 and 4 steps are each clearly worse than many, guided and unguided."""
    return all(row.low > bound for row in rows if row.steps <= 4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=RUNS_FOLDER / "pipeline")
    parser.add_argument("--data", type=Path, default=DATA_FOLDER)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("gate.json"))
    parser.add_argument("--num-pictures", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--bound", type=float, default=0.02, help="least latent MSE that is clearly worse")
    options = parser.parse_args()
    captions = [row["text"] for row in read_metadata(options.data / "held_out")]
    chosen = np.linspace(0, len(captions) - 1, options.num_pictures).astype(int)
    pipeline = StableDiffusionPipeline.from_pretrained(
        options.base, safety_checker=None, feature_extractor=None
    )
    pipeline.set_progress_bar_config(disable=True)
    rows = measure(
        pipeline,
        [captions[i] for i in chosen],
        (1.0, options.guidance),
        options.out.with_suffix(".png"),
    )
    opened = is_open(rows, options.bound)
    record = {"bound": options.bound, "open": opened, "rows": [asdict(row) for row in rows]}
    write_text_aside(options.out, json.dumps(record, indent=1))
    for row in rows:
        print(
            f"guidance {row.guidance:3.1f}  {row.steps} steps: latent MSE to {MANY_STEPS} steps "
            f"{row.latent_mse:.4f} [{row.low:.4f}, {row.high:.4f}]"
        )
    print(f"{'open' if opened else 'closed'}: 1, 2 and 4 steps against a bound of {options.bound}")
    raise SystemExit(0 if opened else 1)


if __name__ == "__main__":
    main()
