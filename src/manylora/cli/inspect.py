"""`manylora inspect`: what an adapter holds, and whether a mixture breaks the model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from manylora.errors import AdapterNotFoundError, ConfigError


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)


def inspect(
    terms: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:WEIGHT]...",
            help="Folders, or names below --adapters. Several are a mixture: pirate:1.0 json:0.5.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model to try it on: a folder, a GGUF file, a hub id."),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapters", help="Folder or URL that holds adapters; repeatable."),
    ] = None,
    probes: Annotated[
        Path | None,
        typer.Option("--probes", help="Own probe texts, one a line; built-in ones if not given."),
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
    texts, and a verdict says whether the model is fine, strained or broken, and by which figures.

    Examples:

        manylora inspect examples/adapters/pirate

        manylora inspect --base smollm2-135m-instruct --adapters examples/adapters pirate:1.0 json:0.8
    """
    from manylora.cli.inspect_adapter import adapter_facts, print_adapter
    from manylora.cli.inspect_mixture import Inspection, inspect_on_base, mixture_facts, print_mixture
    from manylora.lora.convert import load_adapter
    from manylora.lora.diagnose import diagnose_weights
    from manylora.lora.library import Library
    from manylora.lora.mixture import Mixture

    if probes is not None and base is None:
        raise ConfigError("--probes are texts for a model; give --base too")
    mixture = Mixture.parse("+".join(terms))
    if not mixture:
        raise ConfigError(f"{' '.join(terms)}: every weight is 0, which is the base itself")
    library = Library(*(adapters or []))
    folders: dict[str, Path | None] = {}
    loaded = []
    for name in mixture.names:
        if adapters and name in library:
            ref = library.locate(name)
            folders[name] = Path(ref.location) if ref.kind == "folder" else None
            loaded.append(library.load(ref))
        elif Path(name).exists():
            folders[name] = Path(name)
            loaded.append(load_adapter(name, name))
        elif adapters:
            loaded.append(library.load(name))  # raises, with names that are near
        else:
            raise AdapterNotFoundError(
                f"'{name}' is no folder and no file; give the path of an adapter, or a name and the folder "
                "that holds it with --adapters"
            )
    weights = [weight for _, weight in mixture.weights]
    if len(loaded) == 1 and base is None:
        facts = adapter_facts(loaded[0], folders[loaded[0].name])
        print(json.dumps(facts)) if as_json else print_adapter(facts)
        return
    if base is None:
        found = Inspection(str(mixture), diagnose_weights(loaded, weights), None, None)
    else:
        found = inspect_on_base(str(mixture), loaded, weights, base, probes, dtype, device)
    print(json.dumps(mixture_facts(found))) if as_json else print_mixture(found, top)
