"""The demo's picture: a few prompts, each made by the teacher and by few-step mixtures, all in one batch."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from manylora.errors import ConfigError
from manylora.image.params import ImageParams

SHIPPED = Path(__file__).parents[3] / "examples" / "icons"
"""The small base model `model/` and its LoRAs `loras/`, which come with the repository."""

GRID = Path("demo/grid.png")
PROMPTS = ("a cat", "a pizza", "a rocket", "a house", "an umbrella", "a panda", "a guitar", "an apple")
SEED = 11


@dataclass(frozen=True)
class Column:
    """One way of making every prompt's picture."""

    label: str
    mixture: str | None
    params: ImageParams


def columns(guidance: float) -> list[Column]:
    """Return the teacher at 32, 4 and 2 steps, the LCM-LoRA at 4 and 2, and beside two styles at 4."""
    teacher = [
        Column(f"{n} steps", None, ImageParams(sampler="ddim", steps=n, guidance=guidance, seed=SEED))
        for n in (32, 4, 2)
    ]
    few = [
        Column(f"{n}, {label}", mixture, ImageParams(steps=n, seed=SEED))
        for n, label, mixture in (
            (4, "lcm", "lcm"),
            (2, "lcm", "lcm"),
            (4, "+ paper-cut", "lcm+paper-cut:0.8"),
            (4, "+ neon", "lcm+neon:0.8"),
        )
    ]
    return teacher + few


def draw_grid(console: Console, out: Path = GRID) -> None:
    """Make the pictures of all prompts and columns in one batch, and write them as one picture.

    Raises:
        ConfigError: the shipped base is not where a checkout has it, or the picture cannot be written.
    """
    import torch

    from manylora.image.config import ImageEngineConfig
    from manylora.image.engine import ImageEngine
    from manylora.image.grid import labelled_grid
    from manylora.image.png import SETTINGS_KEY, save_png
    from manylora.lora.library import Library
    from manylora.models.diffusion_base import load_diffusion_base

    if not (SHIPPED / "model").is_dir():
        raise ConfigError(
            f"the small image model should be in {SHIPPED / 'model'}; run the demo from a checkout of the repository"
        )
    told = json.loads((SHIPPED / "loras" / "lcm" / "distill.json").read_text(encoding="utf-8"))
    shown = columns(told["guidance"])
    jobs = [(prompt, column) for prompt in PROMPTS for column in shown]
    base = load_diffusion_base(str(SHIPPED / "model"), dtype=torch.float32, device="cpu")
    with ImageEngine(base, Library(SHIPPED / "loras"), ImageEngineConfig(max_batch=len(jobs))) as engine:
        pictures = engine.generate(
            [prompt for prompt, _ in jobs],
            [column.params for _, column in jobs],
            [column.mixture for _, column in jobs],
        )
    for picture in pictures:
        if picture.error is not None:
            raise picture.error
    grid = labelled_grid(
        [[p.image for p in pictures[i : i + len(shown)]] for i in range(0, len(jobs), len(shown))],
        [column.label for column in shown],
        list(PROMPTS),
        title="base at 32, 4, 2 steps; with the LCM-LoRA at 4, 2; with a style at 0.8 beside it",
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_png(grid, out, {SETTINGS_KEY: json.dumps([picture.settings for picture in pictures])})
    except OSError as error:
        raise ConfigError(f"cannot write '{out}': {error.strerror or error}") from None
    console.print(
        f"{out}: {len(jobs)} pictures, {len(PROMPTS)} prompts by {len(shown)} ways of making them"
    )
