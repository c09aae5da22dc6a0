"""Latents of every picture, computed once: python -m icons.latents. Normalises the VAE on the way.

The four channels of a freshly trained VAE have uneven means and spreads, which a noise schedule for unit variance
serves badly. The normalisation is folded into quant_conv and post_quant_conv, both linear, so that the VAE itself gives
and takes normalised latents and no other program needs to know.

    vae/                     with normalised latents
    tokenizer/
    train.latents.npy        [N, 4, 16, 16] fp16, posterior means
    train.tokens.npy         [N, 16] int64
    held_out.*.npy           likewise
    about.json               hashes
"""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from icons.captions import make_tokenizer, token_ids
from icons.folders import DATA_FOLDER, LATENTS_FOLDER, RUNS_FOLDER
from icons.image_folder import read_metadata, read_pixels, to_unit_range
from icons.models import load_vae
from manylora.training.aside import directory_aside

SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class LatentSplit:
    """Latents and captions of one split, memory-mapped."""

    latents: NDArray[np.float16]  # [N, 4, 16, 16]
    tokens: NDArray[np.int64]  # [N, L]


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: NDArray[np.uint8]) -> Tensor:
    """Return posterior means [N, 4, 16, 16] of pictures [N, 64, 64, 3], fp32."""
    parts = np.array_split(pixels, max(1, len(pixels) // 64))
    return torch.cat([vae.encode(to_unit_range(part)).latent_dist.mean for part in parts])


@torch.no_grad()
def fold_normalisation(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Make the VAE give (z - mean) / std and take the same, in place.

    Args:
        mean, std: of each latent channel, [4].
    """
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv  # 1x1: [8, 8, 1, 1] and [4, 4, 1, 1]
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    # The other four outputs are log variances, which a division by std shifts.
    quant.bias[channels:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


def write_latents(vae_folder: Path, data: Path, folder: Path) -> None:
    """Normalise the VAE on the training pictures, encode both splits; the folder appears whole or not at all."""
    vae, tokenizer = load_vae(vae_folder), make_tokenizer()
    rows = {split: read_metadata(data / split) for split in SPLITS}
    latents = {split: encode(vae, read_pixels(data / split, rows[split])) for split in SPLITS}
    mean, std = latents["train"].mean(dim=(0, 2, 3)), latents["train"].std(dim=(0, 2, 3))
    fold_normalisation(vae, mean, std)
    with directory_aside(folder) as aside:
        vae.save_pretrained(aside / "vae")
        tokenizer.save_pretrained(aside / "tokenizer")
        about = {"channel_mean": mean.tolist(), "channel_std": std.tolist(), "sha256": {}}
        for split in SPLITS:
            normalised = (latents[split] - mean[:, None, None]) / std[:, None, None]
            tokens = token_ids(tokenizer, [row["text"] for row in rows[split]])
            for name, array in (("latents", normalised.half().numpy()), ("tokens", tokens)):
                path = aside / f"{split}.{name}.npy"
                np.save(path, array)
                about["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        (aside / "about.json").write_text(json.dumps(about), encoding="utf-8")


def read_split(folder: Path, split: str) -> LatentSplit:
    """Map a split into memory."""
    return LatentSplit(
        np.load(folder / f"{split}.latents.npy", mmap_mode="r"),
        np.load(folder / f"{split}.tokens.npy", mmap_mode="r"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, default=RUNS_FOLDER / "vae" / "vae")
    parser.add_argument("--data", type=Path, default=DATA_FOLDER)
    parser.add_argument("--out", type=Path, default=LATENTS_FOLDER)
    options = parser.parse_args()
    if options.out.is_dir():
        print(f"{options.out} is there already")
        return
    write_latents(options.vae, options.data, options.out)
    print(f"{options.out}: written")


if __name__ == "__main__":
    main()
