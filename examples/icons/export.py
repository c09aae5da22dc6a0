"""Write the average of the newest checkpoint as a diffusers folder: python -m icons.export. Works during training.

In half precision, as it is shipped: what is distilled from it and measured on it is then what others get.
StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None, feature_extractor=None) loads it. `training.json`
beside it says how both runs were made and what they reached.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from icons.folders import LATENTS_FOLDER, RUNS_FOLDER
from icons.models import ModelSize, load_vae
from icons.student import Student
from manylora.errors import TrainingError
from manylora.training.aside import directory_aside
from manylora.training.checkpoint import load_latest
from manylora.training.hardware import describe_environment
from manylora.training.metrics import MetricsLog


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


def record(run: Path) -> dict[str, Any]:
    """Return settings, seconds and the last held-out figures of a run, as its newest checkpoint has them."""
    checkpoint = load_latest(run / "checkpoints")
    assert checkpoint is not None
    rows = [row for row in MetricsLog(run / "metrics.jsonl").rows() if "loss" not in row]
    return {
        "steps": checkpoint.step,
        "train_seconds": round(checkpoint.notes["train_seconds"], 1),
        "held_out": {name: value for name, value in rows[-1].items() if name.startswith("eval")},
        "settings": checkpoint.fingerprint,
    }


def write_base(latents: Path, run: Path, out: Path, size: ModelSize) -> int:
    """Write the newest checkpoint's average to `out`, whole or not at all; returns its step. The VAE's is beside."""
    pipeline, step = read_base(latents, run, size)
    told = {"vae": record(run.with_name("vae")), "base": record(run)}
    told["environment"] = describe_environment(torch.device("cpu"))
    with directory_aside(out) as aside:
        pipeline.to(torch.float16).save_pretrained(aside)
        # Else transformers opens the text encoder as it was written, and diffusers the rest in float32.
        _rewrite(aside / "text_encoder" / "config.json", dtype="float32")
        _rewrite(aside / "vae" / "config.json")
        (aside / "training.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return step


def _rewrite(config: Path, **changes: str) -> None:
    """Change a network's config, and let it name no place of this machine."""
    told = json.loads(config.read_text(encoding="utf-8")) | changes
    told.pop("_name_or_path", None)
    config.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=Path, default=LATENTS_FOLDER)
    parser.add_argument("--run", type=Path, default=RUNS_FOLDER / "base")
    parser.add_argument("--out", type=Path, default=RUNS_FOLDER / "pipeline")
    options = parser.parse_args()
    step = write_base(options.latents, options.run, options.out, ModelSize())
    print(f"{options.out}: the base after {step} steps")


if __name__ == "__main__":
    main()
