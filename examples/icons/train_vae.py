"""Train the VAE: python -m icons.train_vae. Goes on where it was interrupted; ends with the same bits.

L1, plus L1 of the differences between neighbouring pixels (edges stay sharp), plus a little KL. Crops first: a
quarter of the pixels teaches edges and colours as well, four times as fast; whole pictures follow.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from icons.folders import DATA_FOLDER, RUNS_FOLDER
from icons.image_folder import read_metadata, read_pixels, save_grid, to_bytes, to_unit_range
from icons.models import ModelSize, computing_in, fastest_precision, generator, make_vae, nothing_but
from icons.scenes import SIZE
from manylora.training import LoopConfig, TrainingRun
from manylora.training.aside import directory_aside
from manylora.training.hardware import Precision, make_accelerator

NUM_JUDGED = 256
"""Held-out pictures on which a reconstruction is judged."""


@dataclass(frozen=True, kw_only=True)
class VaeTraining:
    """What fixes the VAE's trajectory."""

    num_steps: int = 3000
    crop_steps: int = 2700
    """Steps on crops, the first ones."""
    crop_size: int = 32
    """Pixels of a crop's side."""
    batch: int = 32
    learning_rate: float = 1.5e-3
    kl_weight: float = 1e-3
    seed: int = 0
    precision: Precision = field(default_factory=fastest_precision)
    size: ModelSize = field(default_factory=ModelSize)

    checkpoint_every: int = 200
    """No part of the trajectory."""

    def fingerprint(self) -> dict[str, object]:
        settings = nothing_but(asdict(self), ["checkpoint_every", "size"])
        return settings | {"vae_channels": list(self.size.vae_channels)}


def vae_loss(vae: AutoencoderKL, images: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Return the loss of reconstructing images [B, 3, H, W] through latents sampled with noise [B, 4, H/4, W/4]."""
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    wrong = decoded - images
    edges = wrong.diff(dim=2).abs().mean() + wrong.diff(dim=3).abs().mean()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
    return wrong.abs().mean() + edges + kl_weight * kl


def batch_of(pixels: NDArray[np.uint8], config: VaeTraining, step: int) -> tuple[Tensor, Tensor]:
    """Return (images [B, 3, C, C], noise [B, 4, C/4, C/4]) of a step, C the crop's side or the picture's."""
    draw = generator(config.seed, step)
    rows = torch.randint(len(pixels), (config.batch,), generator=draw).numpy()
    side = config.crop_size if step < config.crop_steps else SIZE
    top, left = torch.randint(SIZE - side + 1, (2,), generator=draw).tolist()
    images = to_unit_range(pixels[rows, top : top + side, left : left + side])
    return images, torch.randn(config.batch, 4, side // 4, side // 4, generator=draw)


def train_vae(
    pixels: NDArray[np.uint8],
    held_out: NDArray[np.uint8],
    config: VaeTraining,
    run_folder: Path,
    say: Callable[[str], None] = print,
) -> AutoencoderKL:
    """Train on pixels [N, 64, 64, 3], or go on, and leave the VAE in `run_folder/vae`."""
    torch.manual_seed(config.seed)
    vae = make_vae(config.size)
    loop = LoopConfig(
        num_steps=config.num_steps,
        learning_rate=config.learning_rate,
        warmup_steps=min(100, config.num_steps // 10),
        final_fraction=0.02,
        checkpoint_every=config.checkpoint_every,
    )
    run = TrainingRun(
        run_folder,
        loop,
        dict(vae.named_parameters()),
        make_accelerator("cpu", "fp32"),
        config.fingerprint(),
    )
    if run.resume():
        say(f"VAE: going on from step {run.step} of {config.num_steps}")

    def losses(step: int) -> Iterator[Tensor]:
        images, noise = batch_of(pixels, config, step)
        with computing_in(config.precision):
            loss = vae_loss(vae, images, noise, config.kl_weight)
        yield loss

    for record in run.steps(losses):
        if record.step % 100 == 0 or record.step == config.num_steps:
            say(
                f"VAE step {record.step}/{config.num_steps}  loss {record.loss:.4f}  {record.seconds:.2f} s a step"
            )
    vae.eval()
    decibels = judge(vae, held_out[:NUM_JUDGED], run_folder / "reconstructions.png")
    say(f"VAE: held-out reconstructions {decibels:.2f} dB")
    run.metrics.append({"step": run.step, "eval_psnr_db": decibels})
    with directory_aside(run_folder / "vae") as aside:
        vae.save_pretrained(aside)
    return vae


@torch.no_grad()
def judge(vae: AutoencoderKL, pixels: NDArray[np.uint8], picture: Path | None = None) -> float:
    """Return the PSNR of reconstructions from the posterior's mean, over all pixels, in dB; draws some of them."""
    decoded = [
        to_bytes(vae.decode(vae.encode(to_unit_range(part)).latent_dist.mean).sample)
        for part in np.array_split(pixels, max(1, len(pixels) // 64))
    ]
    seen = np.concatenate(decoded)
    if picture is not None:
        chosen = np.linspace(0, len(pixels) - 1, min(16, len(pixels))).astype(int)
        save_grid(np.concatenate([pixels[chosen], seen[chosen]]), len(chosen), picture)
    squared = functional.mse_loss(
        torch.from_numpy(seen).float() / 255, torch.from_numpy(pixels).float() / 255
    )
    return float(-10 * torch.log10(squared))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA_FOLDER)
    parser.add_argument("--run", type=Path, default=RUNS_FOLDER / "vae")
    options = parser.parse_args()
    train, held_out = (options.data / split for split in ("train", "held_out"))
    judged = read_metadata(held_out)
    judged = judged[:: max(1, len(judged) // NUM_JUDGED)]
    train_vae(
        read_pixels(train, read_metadata(train)), read_pixels(held_out, judged), VaeTraining(), options.run
    )


if __name__ == "__main__":
    main()
