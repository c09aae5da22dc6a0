"""What a distillation step costs, in seconds and in bytes: on the icons' base here, on SD 1.5 counted.

Time is measured by scripts/distill_rate.py, everything in turn in one run, so a busy machine slows all of it alike.
Peak memory is measured in a process of its own for each way of learning.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from manylora.distill import DistillConfig
from manylora.distill.cost import TrainingBytes, training_bytes
from manylora.distill.learners import DistilledLora, DistilledUnet
from points import Line
from tested import ROOT
from tests.lora.unets import SD15, unet

MIN_RATE = 0.85
MAX_SHARE_OF_FULL = 0.5
RANK, SMALL_RANK = 64, 16

BASE = ROOT / "examples" / "icons" / "model"


def lines() -> Iterator[Line]:
    yield from _bytes_of_sd15()
    yield from _rate()
    yield from _peak_memory()


def _bytes_of_sd15() -> Iterator[Line]:
    """A LoRA of rank 64 with all convs, and all weights; both with an average of what learns, fp32."""
    config = DistillConfig(base="sd15", data=Path(), out=Path("lcm"), rank=RANK)
    with torch.device("meta"):
        lora = training_bytes(DistilledLora(unet(SD15, device="meta"), config), ema=True)
        full = training_bytes(DistilledUnet(unet(SD15, device="meta")), ema=True)
    yield Line(
        f"SD 1.5's UNet, bytes without activations: LoRA of rank {RANK} / all weights",
        f"{_gigabytes(lora)} / {_gigabytes(full)} GB = {lora.total / full.total:.0%}",
        f"<= {MAX_SHARE_OF_FULL:.0%}",
        lora.total <= MAX_SHARE_OF_FULL * full.total,
    )
    for part in ("parameters", "gradients", "optimizer", "ema"):
        own, theirs = getattr(lora, part), getattr(full, part)
        yield Line(f"  of them {part}", f"{own / 1e9:.2f} / {theirs / 1e9:.2f} GB", "less", own < theirs)


def _gigabytes(count: TrainingBytes) -> str:
    return f"{count.total / 1e9:.2f}"


def _rate() -> Iterator[Line]:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "distill_rate.py"),
        str(BASE),
        "--rank",
        str(SMALL_RANK),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        yield Line("step rate", done.stderr.strip().splitlines()[-1][:120], "is measured", False)
        return
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    rate = told["step_rate_of_passes_alone"]
    yield Line(
        f"step rate, batch {told['batch']}, {told['threads']} threads",
        f"{rate:.0%} of what the UNet passes alone allow",
        f">= {MIN_RATE:.0%}",
        rate >= MIN_RATE,
    )
    yield Line(
        "saving against the loop as the formulas are written",
        f"{told['times_the_baseline']:.2f} times its step rate",
        "> 1",
        told["times_the_baseline"] > 1,
    )
    calls = 1000 * (told["teacher_two_calls_s"] - told["teacher_one_call_s"])
    for part, milliseconds in (
        ("teacher's two passes in one call", calls),
        ("latents computed once, no VAE in the loop", 1000 * told["vae_in_the_loop_s"]),
        ("texts encoded once", 1000 * told["texts_in_the_loop_s"]),
    ):
        figure = f"{milliseconds:.1f} of {1000 * told['step_s']:.0f} ms a step"
        yield Line(f"  of it by {part}", figure, "reported", True)


def _peak_memory() -> Iterator[Line]:
    """Steps of a run that learns a LoRA, and of one that learns all weights, each with an average of what learns."""
    peaks = {way: _peak_bytes(way) for way in ("lora", "full")}
    yield Line(
        "icons' base, peak resident memory: LoRA / all weights",
        f"{peaks['lora'] / 1e6:.0f} / {peaks['full'] / 1e6:.0f} MB",
        "less",
        0 < peaks["lora"] < peaks["full"],
    )


def _peak_bytes(way: str) -> int:
    """Peak of a fresh process; 0 if it failed. Most of it is the libraries, which both ways load."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("peak_memory.py")),
        str(BASE),
        way,
        str(SMALL_RANK),
    ]
    path = os.pathsep.join([str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return int(done.stdout.splitlines()[-1]) if done.returncode == 0 else 0
