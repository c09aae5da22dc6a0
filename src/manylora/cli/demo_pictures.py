"""The demo's picture: a few prompts, each made by the base and by few-step mixtures, all in one batch."""

import json
from collections.abc import Sequence
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


def demo_columns() -> list[Column]:
    """Return the base at 32, 4 and 2 steps, with the LCM-LoRA at 4 and 2, and with two styles beside it at 4."""
    return [
        *(slow(f"{n} steps", None, n) for n in (32, 4, 2)),
        *(fast(f"lcm, {n}", "lcm", n) for n in (4, 2)),
        fast("+ paper-cut, 4", "lcm+paper-cut:0.8", 4),
        fast("+ pixel-art, 4", "lcm+pixel-art:0.8", 4),
    ]


def slow(label: str, mixture: str | None, steps: int) -> Column:
    """DDIM, at the guidance that the LCM-LoRA was distilled from."""
    told = json.loads((SHIPPED / "loras" / "lcm" / "distill.json").read_text(encoding="utf-8"))
    return Column(
        label, mixture, ImageParams(sampler="ddim", steps=steps, guidance=told["guidance"], seed=SEED)
    )


def fast(label: str, mixture: str, steps: int) -> Column:
    return Column(label, mixture, ImageParams(steps=steps, seed=SEED))


def draw_grid(
    console: Console, out: Path, prompts: Sequence[str], columns: Sequence[Column], title: str
) -> None:
    """Make the pictures of all prompts and columns in one batch, and write them as one picture.

    Raises:
        ConfigError: the picture cannot be written.
    """
    import torch

    from manylora.image.config import ImageEngineConfig
    from manylora.image.engine import ImageEngine
    from manylora.image.grid import labelled_grid
    from manylora.image.png import SETTINGS_KEY, save_png
    from manylora.lora.library import Library
    from manylora.models.diffusion_base import load_diffusion_base

    jobs = [(prompt, column) for prompt in prompts for column in columns]
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
    rows = [pictures[start : start + len(columns)] for start in range(0, len(jobs), len(columns))]
    grid = labelled_grid(
        [[picture.image for picture in row] for row in rows],
        [column.label for column in columns],
        list(prompts),
        title=title,
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # The grid is there to be shown around, so it names no folder of whoever drew it.
        told = [{**picture.settings, "base": "examples/icons/model"} for picture in pictures]
        save_png(grid, out, {SETTINGS_KEY: json.dumps(told)})
    except OSError as error:
        raise ConfigError(f"cannot write '{out}': {error.strerror or error}") from None
    console.print(f"{out}: {len(jobs)} pictures, {len(prompts)} prompts in {len(columns)} ways")


def draw_demo(console: Console, out: Path = GRID) -> None:
    """Draw the demo's grid.

    Raises:
        ConfigError: the shipped base is not where a checkout has it, or the picture cannot be written.
    """
    if not (SHIPPED / "model").is_dir():
        raise ConfigError(
            f"the small image model should be in {SHIPPED / 'model'}; run the demo from a checkout of the repository"
        )
    title = "the base at 32, 4, 2 steps; with the LCM-LoRA at 4, 2; with a style at 0.8 beside it"
    draw_grid(console, out, PROMPTS, demo_columns(), title)
