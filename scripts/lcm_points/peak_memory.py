"""Peak resident memory of a few distillation steps, in bytes, as the last line: python peak_memory.py BASE WAY RANK."""

import io
import resource
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from distill_rate import CAPTIONS, Noise
from manylora.distill import DistillConfig
from manylora.distill.trainer import Distillation, load_base

NUM_STEPS = 3
"""The optimizer's moments are made in the first."""


def main() -> None:
    base_path, way, rank = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        config = DistillConfig(
            base=base_path,
            data=Path(name),
            out=Path(name) / "lcm",
            runs_dir=Path(name),
            batch=1,
            rank=int(rank),
            full=way == "full",
            ema_decay=0.95,
            num_steps=1000,
            checkpoint_every=1000,
            device="cpu",
        )
        base = load_base(config)
        pictures = Noise(torch.randn(16, *base.latent_shape()), base.encode_prompts(CAPTIONS))
        run = Distillation(config, base, pictures, Console(file=io.StringIO()))  # type: ignore[arg-type]
        steps = run.run.steps(run.losses)
        for _ in range(NUM_STEPS):
            next(steps)
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # Linux counts in KiB


if __name__ == "__main__":
    main()
