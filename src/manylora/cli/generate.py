"""`manylora generate`: pictures of one prompt or of a file of them, each with its own mixture, in one batch."""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress

from manylora.cli.fields import command, value_of
from manylora.cli.generate_loras import read_mixture
from manylora.cli.generate_sweep import Sweep, parse_sweep
from manylora.errors import ConfigError, ManyLoraError, RequestError
from manylora.image.config import ImageEngineConfig
from manylora.image.params import ImageParams
from manylora.json_lines import json_lines
from manylora.lora.library import Library
from manylora.lora.mixture import Mixture

if TYPE_CHECKING:
    from PIL.Image import Image

    from manylora.image.engine import ImageEngine
    from manylora.image.output import ImageOutput, Picture

DTYPES = ("float32", "bfloat16", "float16")

_OPEN_BATCHES = 8
"""Pictures that wait in the engine, in full batches: enough that those of one size and course find each other."""


@dataclass(frozen=True)
class Job:
    """One request to the engine."""

    prompt: str
    params: ImageParams
    mixture: Mixture
    image: Path | None = None


def register(app: typer.Typer) -> None:
    @command(app, "generate", ImageParams, ImageEngineConfig)
    def generate(
        base: Annotated[
            str, typer.Argument(help="Base model: a diffusers folder or a hub id (SD or SDXL layout).")
        ],
        prompt: Annotated[str | None, typer.Argument(help="The prompt; or give --file.")] = None,
        lora: Annotated[
            list[str] | None,
            typer.Option(
                "--lora",
                metavar="NAME[:WEIGHT]",
                help="A name below --adapters, or a path; repeatable. Weight 1 if none.",
            ),
        ] = None,
        adapters: Annotated[
            list[str] | None,
            typer.Option("--adapters", help="Folder or URL that holds adapters; repeatable."),
        ] = None,
        image: Annotated[
            Path | None, typer.Option("--image", help="Picture to start from (image to image).")
        ] = None,
        file: Annotated[
            Path | None,
            typer.Option(
                "--file",
                help='JSONL, one request a line: {"prompt": .., "lora": "lcm:1+style:0.8", "image": path}, and any '
                "image parameter by name.",
            ),
        ] = None,
        out: Annotated[
            Path, typer.Option("--out", help="A .png, or a folder in which pictures are numbered on.")
        ] = Path("pictures"),
        grid: Annotated[
            list[str] | None,
            typer.Option(
                "--grid",
                metavar="AXIS=VALUES",
                help="Sweep into one labelled picture: columns first, then rows, e.g. --grid steps=1,2,4 "
                "--grid style=0,0.5,1. An axis is steps, guidance, seed, strength, or a LoRA (its weight).",
            ),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
        dtype: Annotated[
            str, typer.Option("--dtype", help="Of the networks: float32, bfloat16, float16.")
        ] = "float32",
        device: Annotated[str, typer.Option("--device", help="Where to run: cpu, cuda.")] = "cpu",
        **values: Any,
    ) -> None:
        """Make pictures, each with its own mixture of LoRAs beside the base, in one batch.

        Examples:

            manylora generate my-model "a cat" --adapters loras --lora lcm --lora papercut:0.8 --steps 4

            manylora generate my-model "a cat" --sampler dpm-solver++ --steps 20 --guidance 7.5 --seed 1
        """
        from manylora.image.engine import ImageEngine

        if (prompt is None) == (file is None):
            raise ConfigError("give either a prompt or --file, and not both")
        if file is not None and (lora or image or grid):
            raise ConfigError(
                '--lora, --image and --grid go with one prompt; with --file, each line has its own "lora" and "image"'
            )
        library = Library(*(adapters or []))
        options = value_of(ImageParams, values)
        if prompt is not None:
            jobs = [_job({"prompt": prompt, "lora": lora or [], "image": image}, options, library)]
        else:
            assert file is not None
            jobs = _jobs(file, options, library)
        sweep = parse_sweep(grid, jobs[0].params, jobs[0].mixture) if grid else None
        if any(job.params.sampler == "lcm" and not job.mixture for job in jobs) and not as_json:
            Console(stderr=True, highlight=False, soft_wrap=True).print(
                "[yellow]No LoRA:[/] the sampler lcm wants an LCM-LoRA (--lora); for the base alone try "
                "--sampler dpm-solver++ --steps 20 --guidance 7.5"
            )
        config = ImageEngineConfig(**value_of(ImageEngineConfig, values))
        with ImageEngine(load_base(base, dtype, device), library, config) as engine:
            if sweep is not None:
                has_failed = _write_grid(engine, jobs[0], sweep, out, as_json)
            else:
                has_failed = _write_pictures(engine, jobs, out, as_json)
        if has_failed:
            sys.exit(1)


def load_base(base: str, dtype: str, device: str) -> Any:
    import torch

    from manylora.models.diffusion_base import load_diffusion_base

    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype '{dtype}'; expected one of {', '.join(DTYPES)}")
    return load_diffusion_base(base, dtype=getattr(torch, dtype), device=device)


def _jobs(file: Path, options: dict[str, Any], library: Library) -> list[Job]:
    """What a file asks for. Errors name its line."""
    jobs = []
    for where, row in _rows(file):
        try:
            jobs.append(_job(row, options, library))
        except ManyLoraError as error:
            raise type(error)(f"{where}: {error}") from None
    if not jobs:
        raise ConfigError(
            f"{file} holds no request; expected one JSON object a line, got blank lines at most"
        )
    return jobs


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file, each with where it stands."""
    known = {"prompt", "lora", "image", *(field.name for field in fields(ImageParams))}
    for where, row in json_lines(file):
        if "prompt" not in row or row.keys() - known:
            raise ConfigError(
                f'{where}: expected an object with "prompt", and of {sorted(known)} what is needed; '
                f"got {str(row)[:100]}"
            )
        yield where, row


def _job(row: dict[str, Any], options: dict[str, Any], library: Library) -> Job:
    own = {name: value for name, value in row.items() if name not in ("prompt", "lora", "image")}
    return Job(
        prompt=_checked_text(row["prompt"]),
        params=ImageParams.from_dict({**options, **own}),
        mixture=read_mixture(row.get("lora"), library),
        image=_checked_path(row.get("image")),
    )


def _checked_text(given: Any) -> str:
    if not isinstance(given, str):
        raise RequestError(f"expected the prompt as text, got {given!r}")
    try:
        given.encode()
    except UnicodeEncodeError as error:  # half a character, which no tokenizer takes
        raise RequestError(f"the prompt is no text: {error}") from None
    return given


def _checked_path(given: Any) -> Path | None:
    """Where a picture to start from lies; its pixels are read when its turn comes."""
    if given is None:
        return None
    if not isinstance(given, str | Path):
        raise RequestError(f"expected the picture to start from as a path, got {given!r}")
    with _opened(Path(given)):
        return Path(given)


@contextmanager
def _opened(path: Path) -> "Iterator[Image]":
    """A picture of which only the head is read. What is wrong with it, then or later, names the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for broken files
        raise RequestError(f"cannot read the picture '{path}': {error}") from None


def _read_image(path: Path | None) -> "Image | None":
    if path is None:
        return None
    from PIL import ImageOps

    with _opened(path) as image:
        # Turned as a camera says that it was held.
        return ImageOps.exif_transpose(image)


def _pictures(
    engine: "ImageEngine", jobs: Sequence[Job], on_output: "Callable[[ImageOutput], None]"
) -> "Iterator[tuple[int, Picture]]":
    """Make pictures; yields each as soon as it has ended, with its place: jobs in order, n for each.

    What was refused before it began has one place.
    """
    from manylora.image.output import refused

    ahead = deque(jobs)
    first_places: dict[str, int] = {}
    num_placed = num_ended = 0
    while ahead or engine.has_work():
        while ahead and num_placed - num_ended < _OPEN_BATCHES * engine.config.max_batch:
            job = ahead.popleft()
            try:
                request_id = engine.submit(
                    job.prompt, job.params, job.mixture, image=_read_image(job.image)
                )
            except ManyLoraError as error:
                yield num_placed, refused(job.prompt, job.params, engine.base.path, error)
                num_placed, num_ended = num_placed + 1, num_ended + 1
            else:
                first_places[request_id] = num_placed
                num_placed += job.params.n
        for output in engine.step():
            on_output(output)
            if output.picture is not None:
                yield first_places[output.request_id] + output.index, output.picture
                num_ended += 1


@contextmanager
def _progress(
    jobs: Sequence[Job], quiet: bool
) -> "Iterator[tuple[Progress, Callable[[ImageOutput], None]]]":
    """Show how many steps of all pictures are done, on the terminal if there is one."""
    num_steps = sum(job.params.steps * job.params.n for job in jobs)
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    done: dict[tuple[str, int], int] = {}
    with Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    ) as progress:
        task = progress.add_task("steps", total=num_steps)

        def on_output(output: "ImageOutput") -> None:
            # A picture that fails, or begins from another, takes fewer steps: they count as done.
            picture = output.picture
            done[output.request_id, output.index] = (
                output.num_done if picture is None else picture.params.steps
            )
            progress.update(task, completed=sum(done.values()))

        yield progress, on_output


def _write_pictures(engine: "ImageEngine", jobs: Sequence[Job], out: Path, as_json: bool) -> bool:
    """Make pictures and write each as soon as it is made; returns whether any failed."""
    from manylora.image.png import chunks_of

    has_failed = False
    paths = _paths(out, sum(job.params.n for job in jobs))
    untold: dict[int, tuple[Picture, Path | None]] = {}
    num_told = 0
    with _progress(jobs, quiet=as_json) as (progress, on_output):
        for place, picture in _pictures(engine, jobs, on_output):
            path = None
            if picture.image is None:
                has_failed = True
            else:
                path = paths[place] if out.suffix == ".png" else _numbered(paths[place], picture)
                _save(picture.image, path, chunks_of(picture))
            untold[place] = replace(picture, image=None), path
            while num_told in untold:
                progress.stop()  # or what is told would stand within the bar
                _tell(*untold.pop(num_told), as_json)
                progress.start()
                num_told += 1
    return has_failed


def _write_grid(engine: "ImageEngine", job: Job, sweep: Sweep, out: Path, as_json: bool) -> bool:
    """Make the cells of a sweep and write them as one picture; returns whether any failed."""
    from manylora.image.grid import labelled_grid
    from manylora.image.png import SETTINGS_KEY

    if job.params.n != 1:
        raise ConfigError(f"--grid makes one picture a cell; got --n {job.params.n}")
    # One seed for all cells, or they would differ by it.
    params = replace(job.params, seed=_any_seed() if job.params.seed is None else job.params.seed)
    cells = sweep.cells(params, job.mixture)
    jobs = [replace(job, params=one, mixture=mixture) for row in cells for one, mixture in row]
    with _progress(jobs, quiet=as_json) as (_, on_output):
        made = dict(_pictures(engine, jobs, on_output))
    pictures = [made[place] for place in range(len(jobs))]
    width = len(sweep.columns.values)
    images = [picture.image for picture in pictures]
    grid = labelled_grid(
        [images[start : start + width] for start in range(0, len(images), width)],
        sweep.columns.labels,
        sweep.row_labels,
        title=f"{job.prompt}  [{job.mixture}]",
    )
    (path,) = _paths(out, 1)
    settings = {"cells": [picture.settings for picture in pictures], "columns": width}
    _save(grid, path, {SETTINGS_KEY: json.dumps(settings, ensure_ascii=False)})
    failed = [picture for picture in pictures if picture.error is not None]
    for picture in failed:
        _tell(picture, None, as_json)
    if as_json:
        print(json.dumps({"path": str(path), "num_cells": len(pictures), "num_failed": len(failed)}))
    else:
        Console(highlight=False, soft_wrap=True).print(f"{escape(str(path))}  {len(pictures)} cells")
    return bool(failed)


def _any_seed() -> int:
    import secrets

    return secrets.randbits(32)


def _save(image: "Image", path: Path, chunks: Mapping[str, str]) -> None:
    from manylora.image.png import save_png

    try:
        save_png(image, path, chunks)
    except OSError as error:
        raise ConfigError(f"cannot write '{path}': {error.strerror or error}") from None


def _paths(out: Path, num: int) -> list[Path]:
    """Where to write: the file named, or numbers in the folder that follow those already there."""
    if out.suffix == ".png":
        return [out] if num == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(num)]
    taken = [path.stem.partition("-")[0] for path in out.glob("*.png")]
    first = max((int(number) + 1 for number in taken if number.isdecimal()), default=0)
    return [out / f"{first + i:05d}.png" for i in range(num)]


def _numbered(path: Path, picture: "Picture") -> Path:
    """The path with the picture's seed; once more where another run has numbered on in the folder meanwhile."""
    named = path.with_stem(f"{path.stem}-{picture.params.seed}")
    return _numbered(named, picture) if named.exists() else named


def _tell(picture: "Picture", path: Path | None, as_json: bool) -> None:
    if as_json:
        told = {
            **picture.settings,
            "path": None if path is None else str(path),
            "error": None if picture.error is None else str(picture.error),
        }
        print(json.dumps(told, ensure_ascii=False), flush=True)
    elif picture.error is not None:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(
            f"[bold]{escape(picture.prompt)}[/]  [red]{type(picture.error).__name__}: {escape(str(picture.error))}[/]"
        )
    else:
        console = Console(highlight=False, soft_wrap=True)
        console.print(
            f"{escape(str(path))}  [bold]{escape(picture.prompt)}[/]  [dim]{escape(str(picture.mixture))}  "
            f"seed {picture.params.seed}[/]"
        )
