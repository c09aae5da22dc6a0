"""How much of a distillation step is UNet passes, and what each saving saves: one JSON object on the last line.

python scripts/distill_rate.py BASE [--batch 8] [--rank 16] [--rounds 7]

Pictures are noise: only time is measured. Everything is timed in turn, round after round, so that a machine that slows
down slows all of it down; of each the fastest round counts.
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from manylora.distill import DistillConfig
from manylora.distill.trainer import Distillation, load_base
from manylora.models.diffusion_base import Condition, DiffusionBase, run_unet

CAPTIONS = ("", "a cat", "a house", "two trees", "a red car")


@dataclass(frozen=True)
class Noise:
    """Pictures of nothing, with captions."""

    latents: Tensor
    conditions: Condition
    captions: tuple[str, ...] = CAPTIONS
    left_out: tuple[()] = ()
    content_hash: str = "noise"
    num_cut: int = 0

    @property
    def caption_rows(self) -> Any:
        return np.arange(len(self.latents)) % len(CAPTIONS)

    def __len__(self) -> int:
        return len(self.latents)

    def latents_of(self, rows: Any) -> Tensor:
        return self.latents[list(rows)]

    def conditions_of(self, caption_rows: Any) -> Condition:
        return self.conditions.rows(list(caption_rows))


def fastest(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each work's fastest round; one round before is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return {name: min(of[1:]) for name, of in seconds.items()}


def works_of(run: Distillation, base: DiffusionBase, batch: int) -> dict[str, Callable[[], Any]]:
    """What is timed: a whole step, its UNet passes alone, and what the savings replace."""
    z = torch.randn(batch, *run.latent_shape)
    t = torch.full((batch,), 519)
    side = run.latent_shape[1] * base.latent_factor
    pixels = torch.rand(batch, 3, side, side) * 2 - 1
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(batch)]
    condition, empty = base.encode_prompts(captions), base.unconditional().expand(batch)
    w = torch.zeros(batch)
    steps = run.run.steps(run.losses)

    def passes() -> None:
        """The passes that the objective needs, and nothing else."""
        with torch.no_grad():
            run.teacher(z, t, condition)
            run.student(z, t, condition, w)
        run.student(z, t, condition, w).float().mean().backward()

    @torch.no_grad()
    def teacher(apart: bool) -> None:
        if not apart:
            run.teacher(z, t, condition)
            return
        with run.learner.teacher() as unet:
            for c in (condition, empty):
                run_unet(unet, z, t, c)

    return {
        "step": lambda: next(steps),
        "passes": passes,
        "teacher_one_call": lambda: teacher(apart=False),
        "teacher_two_calls": lambda: teacher(apart=True),
        "vae_in_the_loop": lambda: base.encode_images(pixels),
        "texts_in_the_loop": lambda: base.encode_prompts(captions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        config = DistillConfig(
            base=options.base,
            data=Path(name),
            out=Path(name) / "lcm",
            runs_dir=Path(name),
            batch=options.batch,
            rank=options.rank,
            num_steps=10_000,
            checkpoint_every=10_000,
            device="cpu",
        )
        base = load_base(config)
        num_unet = sum(p.numel() for p in base.unet.parameters())
        noise = torch.randn(64, *base.latent_shape())
        pictures = Noise(noise, base.encode_prompts(CAPTIONS))
        run = Distillation(config, base, pictures, Console(file=io.StringIO()))  # type: ignore[arg-type]
        seconds = fastest(works_of(run, base, options.batch), options.rounds)
    baseline = (
        seconds["step"]
        + (seconds["teacher_two_calls"] - seconds["teacher_one_call"])
        + seconds["vae_in_the_loop"]
        + seconds["texts_in_the_loop"]
    )
    print(
        json.dumps(
            {
                "unet_parameters": num_unet,
                "threads": torch.get_num_threads(),
                "batch": options.batch,
                "rank": options.rank,
                "step_rate_of_passes_alone": round(seconds["passes"] / seconds["step"], 3),
                "times_the_baseline": round(baseline / seconds["step"], 3),
                **{f"{work}_s": round(s, 5) for work, s in seconds.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
