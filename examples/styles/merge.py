"""Fold a LoRA into a copy of the base: python -m styles.merge. Makes the base fine-tuned on another set.

An acceleration LoRA that is universal must also speed up a base whose weights have moved. The recipe moves them by a
LoRA of rank 64 at every site, convolutions included, and adds its delta to the weights: at widths of 64 to 192 that is
a third of full rank in the widest layers and all of it in the narrowest. Afterwards nothing tells the result from a
base: it is a diffusers folder without any adapter.
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from manylora import load_adapter
from manylora.lora.adapter import Adapter
from manylora.training.aside import directory_aside
from styles.folders import FINETUNED_FOLDER, LORAS_FOLDER, PIPELINE_FOLDER


@torch.no_grad()
def add_to_weights(unet: UNet2DConditionModel, adapter: Adapter, weight: float = 1.0) -> None:
    """Add `weight` times the adapter's delta to the UNet, in place."""
    for site, pair in adapter.sites.items():
        base_weight = unet.get_submodule(site).weight  # [O, D] or [O, in, height, width]
        delta = weight * pair.delta().reshape(base_weight.shape)
        base_weight.copy_(base_weight.double() + delta)


def write_merged(base: Path, lora: Path, out: Path) -> None:
    """Write the pipeline `base` with `lora` in its weights; the folder appears whole or not at all."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32)
    add_to_weights(unet, load_adapter(lora))
    with directory_aside(out) as aside:
        shutil.copytree(base, aside, ignore=shutil.ignore_patterns("unet"), dirs_exist_ok=True)
        unet.save_pretrained(aside / "unet")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, default=PIPELINE_FOLDER)
    parser.add_argument("--lora", type=Path, default=LORAS_FOLDER / "finetune-fluent-emoji")
    parser.add_argument("--out", type=Path, default=FINETUNED_FOLDER)
    options = parser.parse_args()
    write_merged(options.base, options.lora, options.out)
    print(f"{options.out}: {options.base} with {options.lora} in its weights")


if __name__ == "__main__":
    main()
