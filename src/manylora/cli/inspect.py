"""`manylora inspect`: what an adapter holds, and whether a mixture breaks the model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from manylora.errors import AdapterNotFoundError, ConfigError
from manylora.lora.adapter import Adapter
from manylora.lora.mixture import Mixture


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)


def inspect(
    terms: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:WEIGHT]...",
            help="Folders, or names below --adapters. Several, or one with a weight other than 1, are a mixture: "
            "pirate:1.0 json:0.5.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="Base model to try it on: a folder, a GGUF file, a hub id; or a diffusers folder.",
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapters", help="Folder or URL that holds adapters; repeatable."),
    ] = None,
    probes: Annotated[
        Path | None,
        typer.Option(
            "--probes", help="Own probe texts or captions, one a line; built-in ones if not given."
        ),
    ] = None,
    fast: Annotated[
        list[str] | None,
        typer.Option(
            "--fast",
            help="Pictures: the acceleration LoRA of the mixture, beside which the others are judged; repeatable. If "
            "not given, those that `manylora distill` made.",
        ),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Pictures: propose weights with which the mixture does not break."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Pictures: draw the evidence, as this PNG.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Sites and pairs of adapters to list.")] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with every site.")
    ] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of base weights: float32, bfloat16, float16.")
    ] = "float32",
    device: Annotated[str, typer.Option("--device", help="Where to run: cpu, cuda.")] = "cpu",
) -> None:
    """Describe one adapter, or diagnose a mixture.

    The files alone tell sizes, norms and how adapters lie to each other. With --base the mixture also runs on a few
    texts, or denoises a few captions, and a verdict says whether the model is fine, strained or broken, and by which
    figures.

    Examples:

        manylora inspect examples/adapters/pirate

        manylora inspect --base smollm2-135m-instruct --adapters examples/adapters pirate:1.0 json:0.8

        manylora inspect --base examples/icons/model --adapters examples/icons/loras lcm paper-cut:0.8 --repair
    """
    from manylora.cli.inspect_adapter import adapter_facts, print_adapter
    from manylora.cli.inspect_image import (
        ImageOptions,
        image_facts,
        inspect_pictures,
        is_diffusion_base,
        print_image,
    )
    from manylora.cli.inspect_mixture import Inspection, inspect_on_base, mixture_facts, print_mixture
    from manylora.lora.diagnose import diagnose_weights

    if probes is not None and base is None:
        raise ConfigError("--probes are texts for a model; give --base too")
    of_pictures = base is not None and is_diffusion_base(base)
    if not of_pictures and (fast or repair or plot is not None):
        raise ConfigError("--fast, --repair and --plot are for pictures; give a diffusers folder as --base")
    if plot is not None and plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot writes a PNG: expected a name that ends in .png, got {plot}")
    mixture = Mixture.parse("+".join(terms))
    if not mixture:
        raise ConfigError(f"{' '.join(terms)}: every weight is 0, which is the base itself")
    loaded, folders = _load(mixture.names, adapters or [])
    weights = [weight for _, weight in mixture.weights]
    if weights == [1.0] and base is None:
        facts = adapter_facts(loaded[0], folders[0])
        print(json.dumps(facts)) if as_json else print_adapter(facts)
    elif base is not None and of_pictures:
        options = ImageOptions(probes, tuple(fast or ()), repair, dtype, device)
        seen = inspect_pictures(loaded, weights, folders, base, options)
        print(json.dumps(image_facts(seen))) if as_json else print_image(seen, top)
        if plot is not None:
            from manylora.cli.inspect_plot import plot_inspection

            try:
                plot_inspection(seen, plot)
            except OSError as error:
                raise ConfigError(f"cannot write '{plot}': {error.strerror or error}") from None
    else:
        found = (
            Inspection(str(mixture), diagnose_weights(loaded, weights), None, None)
            if base is None
            else inspect_on_base(str(mixture), loaded, weights, base, probes, dtype, device)
        )
        print(json.dumps(mixture_facts(found))) if as_json else print_mixture(found, top)


def _load(names: Sequence[str], roots: Sequence[str]) -> tuple[list[Adapter], list[Path | None]]:
    """Return the adapters, and the local folder of each, None where it has none."""
    from manylora.lora.convert import load_adapter
    from manylora.lora.library import Library

    library, loaded, folders = Library(*roots), list[Adapter](), list[Path | None]()
    for name in names:
        if roots and name in library:
            ref = library.locate(name)
            folders.append(Path(ref.location) if ref.kind == "folder" else None)
            loaded.append(library.load(ref))
        elif Path(name).exists():
            folders.append(Path(name))
            loaded.append(load_adapter(name, name))
        elif roots:
            loaded.append(library.load(name))  # raises, with names that are near
        else:
            raise AdapterNotFoundError(
                f"'{name}' is no folder and no file; give the path of an adapter, or a name and the folder "
                "that holds it with --adapters"
            )
    return loaded, folders
