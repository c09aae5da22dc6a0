"""Train the judge of generated pictures on drawn ones: python -m icons.judge [--styles NAME ...].

Without --styles it learns the hundred names and the four icon sets of the base: its features are the space in which
sets of pictures are compared, its names say whether a picture shows its prompt. With --styles it learns the names and
which style a picture has, from pictures of those styles beside the base's: it judges what style LoRAs do.

It sees drawn pictures only, never a generated one. It is trained before the first distillation that it judges, and
known by a hash from then on. Goes on where it was interrupted; ends with the same bits.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from icons.folders import DATA_FOLDER, RUNS_FOLDER
from icons.image_folder import to_unit_range
from icons.judge_data import NAMES, JudgeData, base_data, batches, style_data
from icons.models import generator, nothing_but
from manylora.bench.image.judge import Judge, JudgeNet, JudgeSize, save_judge
from manylora.training import LoopConfig, TrainingRun
from manylora.training.hardware import make_accelerator


@dataclass(frozen=True, kw_only=True)
class JudgeTraining:
    """What fixes the judge's trajectory."""

    num_steps: int = 1200
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    shift: int = 3
    """Most pixels by which a picture is moved; edges are repeated."""
    noise: float = 0.04
    """Spread of the noise added to pixels in [-1, 1]; less than that and a rounding of a decoder could matter."""
    seed: int = 0
    size: JudgeSize = field(default_factory=JudgeSize)

    checkpoint_every: int = 200
    """No part of the trajectory."""

    def fingerprint(self) -> dict[str, object]:
        settings = nothing_but(asdict(self), ["checkpoint_every", "size"])
        return settings | {"channels": list(self.size.channels)}


def moved(images: Tensor, draw: torch.Generator, reach: int) -> Tensor:
    """Return images [B, 3, H, W] each moved by up to `reach` pixels a side."""
    side = images.shape[-1]
    padded = functional.pad(images, [reach] * 4, mode="replicate")
    places = torch.randint(2 * reach + 1, (len(images), 2), generator=draw).tolist()
    return torch.stack(
        [image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded, places, strict=True)]
    )


def batch_of(data: JudgeData, config: JudgeTraining, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (images [B, 3, 64, 64], names [B], looks [B]) of a step: a function of the step alone."""
    draw = generator(config.seed, step)
    rows = torch.randint(len(data.pixels), (config.batch,), generator=draw).numpy()
    images = moved(to_unit_range(data.pixels[rows]), draw, config.shift)
    images = images + config.noise * torch.randn(images.shape, generator=draw)
    return images, torch.from_numpy(data.names[rows]), torch.from_numpy(data.looks[rows])


def train_judge(
    data: JudgeData,
    held_out: JudgeData,
    config: JudgeTraining,
    run_folder: Path,
    say: Callable[[str], None] = print,
) -> Judge:
    """Train on drawn pictures, or go on, and leave the judge in `run_folder/judge`."""
    torch.manual_seed(config.seed)
    net = JudgeNet(len(NAMES), len(data.look_names), config.size).train()
    loop = LoopConfig(
        num_steps=config.num_steps,
        learning_rate=config.learning_rate,
        warmup_steps=min(100, config.num_steps // 10),
        final_fraction=0.02,
        weight_decay=config.weight_decay,
        checkpoint_every=config.checkpoint_every,
    )
    run = TrainingRun(
        run_folder,
        loop,
        dict(net.named_parameters()),
        make_accelerator("cpu", "fp32"),
        config.fingerprint() | {"data": data.sha256},
        dict(net.named_buffers()),  # batch norm's running moments belong to what a kill must not lose
    )
    if run.resume():
        say(f"judge: going on from step {run.step} of {config.num_steps}")

    def losses(step: int) -> Iterator[Tensor]:
        images, names, looks = batch_of(data, config, step)
        of_names, of_looks = net(images)
        yield functional.cross_entropy(of_names, names) + 0.3 * functional.cross_entropy(of_looks, looks)

    for record in run.steps(losses):
        if record.step % 100 == 0 or record.step == config.num_steps:
            left = (config.num_steps - record.step) * record.seconds
            say(
                f"judge step {record.step}/{config.num_steps}  loss {record.loss:.3f}  "
                f"{record.seconds:.2f} s a step, about {left / 60:.0f} minutes left"
            )
    net.eval()
    accuracy = held_out_accuracy(net, held_out)
    run.metrics.append({"step": run.step, "eval_accuracy": accuracy})
    about = {
        "trained_on": {"sha256": data.sha256, "num_pictures": len(data.pixels)},
        "settings": config.fingerprint(),
        "held_out_accuracy": accuracy,
        "train_seconds": round(run.notes["train_seconds"], 1),
    }
    judge = save_judge(run_folder / "judge", net, config.size, NAMES, data.look_names, about)
    say(f"judge {judge.sha256[:12]}: " + ", ".join(f"{name} {x:.1%}" for name, x in accuracy.items()))
    return judge


@torch.no_grad()
def held_out_accuracy(net: JudgeNet, data: JudgeData) -> dict[str, float]:
    """Return shares of right answers: "name" and "look"."""
    scored = [net(to_unit_range(data.pixels[part])) for part in batches(data, 64)]
    names, looks = (torch.cat(column).argmax(dim=1).numpy() for column in zip(*scored, strict=True))
    return {"name": float((names == data.names).mean()), "look": float((looks == data.looks).mean())}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA_FOLDER)
    parser.add_argument("--styles", nargs="+", default=[], metavar="NAME", help="drawn by styles.make_data")
    parser.add_argument("--styles-data", type=Path, default=DATA_FOLDER.parent / "styles")
    parser.add_argument("--run", type=Path, help="where the run is kept; judge or style-judge by default")
    parser.add_argument("--num-steps", type=int, default=JudgeTraining.num_steps)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    train, held_out = (
        style_data(options.data, options.styles_data, split, options.styles)
        if options.styles
        else base_data(options.data, split)
        for split in ("train", "held_out")
    )
    run = options.run or RUNS_FOLDER / ("style-judge" if options.styles else "judge")
    train_judge(train, held_out, JudgeTraining(num_steps=options.num_steps, seed=options.seed), run)


if __name__ == "__main__":
    main()
