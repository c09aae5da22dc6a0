"""`manylora compose` and `manylora convert`: adapters and models from files to files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from manylora.errors import ConfigError


def register(app: typer.Typer) -> None:
    app.command("compose")(compose)
    app.command("convert")(convert)


DtypeName = Literal["float32", "bfloat16", "float16"]
FormatName = Literal["peft", "diffusers", "kohya"]


def compose(
    mixture: Annotated[str, typer.Argument(help="What to compose: a:1.0+b:0.5.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the adapter to, in PEFT's layout.")],
    adapters: Annotated[
        list[str], typer.Option("--adapters", help="Folder or URL that holds adapters; repeatable.")
    ],
    method: Annotated[
        Literal["exact", "svd", "ties", "dare"],
        typer.Option(
            help="exact stacks ranks; svd cuts them to --rank; ties and dare merge what conflicts."
        ),
    ] = "exact",
    rank: Annotated[int | None, typer.Option(help="Largest rank of a site (svd, ties, dare).")] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries kept (ties, dare).")] = None,
    seed: Annotated[int | None, typer.Option(help="Which entries dare keeps.")] = None,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Of the file; else one that holds the result.")
    ] = None,
) -> None:
    """Make one adapter file of a mixture. Serving needs none: it runs mixtures as they are.

    Example:

        manylora compose pirate:1.0+headline:0.5 ./both --adapters examples/adapters --method svd --rank 4
    """
    import torch

    from manylora.lora.compose import compose as compose_adapters
    from manylora.lora.formats import save_peft
    from manylora.lora.library import Library
    from manylora.lora.mixture import Mixture

    library, parsed = Library(*adapters), Mixture.parse(mixture)
    if not parsed:
        raise ConfigError(f"the mixture {mixture!r} names no adapter")
    loaded = [library.load(name) for name in parsed.names]
    result = compose_adapters(
        loaded,
        [weight for _, weight in parsed.weights],
        method,
        rank=rank,
        density=density,
        seed=seed,
        dtype=None if dtype is None else getattr(torch, dtype),
        name=out.name,
    )
    with _writing(out):
        save_peft(result.adapter, out)
    ranks = result.adapter.ranks.values()
    Console(highlight=False).print(
        f"{out}: {len(ranks)} sites, ranks {min(ranks)} to {max(ranks)}, {result.adapter.num_bytes / 1e6:.2f} MB; "
        f"relative error against {'the exact sum' if method in ('exact', 'svd') else method} {result.error:.2e}"
    )


def convert(
    source: Annotated[
        str, typer.Argument(help="A GGUF model; or an adapter: its folder, or its .safetensors file.")
    ],
    out: Annotated[
        Path,
        typer.Argument(help="Folder to write, or the .safetensors file of kohya's or diffusers' format."),
    ],
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Of an adapter's file; its own if not given.")
    ] = None,
    form: Annotated[
        FormatName | None,
        typer.Option("--format", help="Of an adapter's file; PEFT's if not given. Read is what is there."),
    ] = None,
    layout: Annotated[
        Literal["sd", "sdxl"] | None,
        typer.Option(help="Which model kohya's names are for, where the adapter does not tell."),
    ] = None,
) -> None:
    """Write a GGUF model as a transformers folder, or an adapter in another format or dtype.

    A model's weights are dequantised to float32, so that what you train on is what is served.

    An adapter is the same to the last bit in every format that can hold it; what one cannot hold is refused by name.

    Examples:

        manylora convert smollm2-135m-instruct ./SmolLM2-135M-Instruct

        manylora convert style.safetensors ./style --format diffusers
    """
    if _is_adapter(Path(source)):
        _convert_adapter(Path(source), out, dtype, form or "peft", layout)
    elif given := [
        option for option, value in (("dtype", dtype), ("format", form), ("layout", layout)) if value
    ]:
        raise ConfigError(f"--{given[0]} is for adapters; a GGUF model is written in float32")
    else:
        from manylora.models.convert import save_hf

        with _writing(out):
            save_hf(source, out)
    Console(highlight=False).print(f"wrote {out}")


def _is_adapter(source: Path) -> bool:
    files = ("adapter_config.json", "pytorch_lora_weights.safetensors")
    return source.suffix == ".safetensors" or any((source / file).is_file() for file in files)


def _convert_adapter(
    source: Path,
    out: Path,
    dtype: DtypeName | None,
    form: FormatName,
    layout: Literal["sd", "sdxl"] | None,
) -> None:
    from dataclasses import replace

    import torch

    from manylora.lora.convert import load_adapter, save_adapter

    if layout is not None and form != "kohya":
        raise ConfigError(f"--layout is for --format kohya; {form} has one name for each site")
    adapter = load_adapter(source)
    if dtype is not None:
        to = getattr(torch, dtype)
        sites = {
            site: replace(pair, lora_a=pair.lora_a.to(to), lora_b=pair.lora_b.to(to))
            for site, pair in adapter.sites.items()
        }
        adapter = replace(adapter, sites=sites)
    with _writing(out):
        save_adapter(adapter, out, form, layout=layout)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write '{out}': {error.strerror or error}") from None
