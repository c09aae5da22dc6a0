"""Write the average of the newest checkpoint as a diffusers folder: python -m icons.export. Works during training.

StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None, feature_extractor=None) loads it.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from icons.folders import LATENTS_FOLDER, RUNS_FOLDER
from icons.models import ModelSize, load_vae
from icons.student import Student
from manylora.errors import TrainingError
from manylora.training.aside import directory_aside
from manylora.training.checkpoint import load_latest


def read_base(latents: Path, run: Path, size: ModelSize) -> tuple[StableDiffusionPipeline, int]:
    """Return (pipeline of the averaged weights, step) of the newest checkpoint.

    Raises:
        TrainingError: the run has no checkpoint yet.
    """
    checkpoint = load_latest(run / "checkpoints")
    if checkpoint is None:
        raise TrainingError(f"no checkpoint below {run}: start `python -m icons.train_base` first")
    student = Student(size, CLIPTokenizer.from_pretrained(latents / "tokenizer"), seed=0)
    with torch.no_grad():
        for name, tensor in student.averaged_tensors.items():
            tensor.copy_(checkpoint.parameters[name])
    return student.pipeline(load_vae(latents / "vae")), checkpoint.step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=Path, default=LATENTS_FOLDER)
    parser.add_argument("--run", type=Path, default=RUNS_FOLDER / "base")
    parser.add_argument("--out", type=Path, default=RUNS_FOLDER / "pipeline")
    options = parser.parse_args()
    pipeline, step = read_base(options.latents, options.run, ModelSize())
    with directory_aside(options.out) as aside:
        pipeline.save_pretrained(aside)
    print(f"{options.out}: the base after {step} steps")


if __name__ == "__main__":
    main()
