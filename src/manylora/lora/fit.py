"""Whether an adapter fits a base model, which is known by its sites and their sizes; and how it might be made to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from manylora.errors import AdapterMismatchError
from manylora.lora.adapter import Adapter

NUM_SHOWN = 3
"""Sites that a message names before it counts the others."""


def check_fits(adapter: Adapter, base_sites: Mapping[str, tuple[int, int]], model_name: str) -> None:
    """Check that the model has every site of the adapter, in its size. An adapter that fits in part is refused.

    Args:
        base_sites: site to (in_features, out_features); of a Conv2d, in_features counts the kernel as `LoraPair` does.
        model_name: for the message.

    Raises:
        AdapterMismatchError: with names or sizes of both sides, and a renaming that would make it fit.
    """
    missing = [site for site in adapter.sites if site not in base_sites]
    if missing:
        found = len(adapter.sites) - len(missing)
        extent = f"has {found} of {len(adapter.sites)} sites in" if found else "fits no module of"
        raise AdapterMismatchError(
            f"{adapter.label} {extent} '{model_name}'.\n"
            f"  adapter names: {_first(missing)}\n"
            f"  model names:   {_first(base_sites)}\n"
            f"  {_hint(adapter, base_sites)}"
        )
    wrong = [
        f"{site}: expected in {base_sites[site][0]}, out {base_sites[site][1]}, "
        f"got in {header.in_features}, out {header.out_features}"
        for site, header in adapter.packed.table.sites.items()
        if (header.in_features, header.out_features) != base_sites[site]
    ]
    if wrong:
        raise AdapterMismatchError(
            f"{adapter.label} does not fit '{model_name}': {len(wrong)} of {len(adapter.sites)} sites have "
            f"another size.\n  {_first(wrong)}\n  {_origin(adapter)}"
        )


def move_sites(adapter: Adapter, old: str, new: str) -> Adapter:
    """Return the adapter with the beginning `old` of its sites replaced by `new`; both may be empty.

    Raises:
        AdapterMismatchError: a site does not begin so.
    """
    others = [site for site in adapter.sites if not site.startswith(old)]
    if others:
        raise AdapterMismatchError(
            f"{adapter.label} has sites that do not begin with '{old}': {_first(others)}"
        )
    return replace(adapter, sites={new + site[len(old) :]: pair for site, pair in adapter.sites.items()})


def _first(names: Collection[str]) -> str:
    shown = "\n                 ".join(list(names)[:NUM_SHOWN])
    return f"{shown} (+ {len(names) - NUM_SHOWN} more)" if len(names) > NUM_SHOWN else shown or "none"


def _origin(adapter: Adapter) -> str:
    return f"It was trained on {adapter.base_model or 'a model that its file does not name'}."


def _hint(adapter: Adapter, base_sites: Mapping[str, tuple[int, int]]) -> str:
    first = next(iter(adapter.sites))
    for old, new in sorted(
        {_beginnings(first, site) for site in base_sites}, key=lambda pair: len("".join(pair))
    ):
        if all(
            site.startswith(old)
            and base_sites.get(new + site[len(old) :]) == (pair.in_features, pair.out_features)
            for site, pair in adapter.sites.items()
        ):
            return f"It would fit with other names: move_sites(adapter, {old!r}, {new!r}), then save it."
    return _origin(adapter)


def _beginnings(left: str, right: str) -> tuple[str, str]:
    """What is left of two paths without the parts that they end with in common."""
    a, b = left.split("."), right.split(".")
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return "".join(f"{part}." for part in a), "".join(f"{part}." for part in b)
