"""What adapters lose to rounding in pages of the chosen size, and in the layouts that were not chosen.

    python -m manylora.memory.waste     # prints a table for each model; exits 1 if a model breaks the bound

The reasons for the layout are in docs/decisions/0001-one-pool-of-byte-pages.md.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence

from manylora.memory.page_size import (
    MAX_WASTE,
    MIN_RANK,
    SEQUENCE_TOKENS,
    ModelShape,
    adapter_waste,
    choose_page_tokens,
    kv_waste,
    rank_runs,
    worst_adapter_waste,
)

RANKS = (4, 8, 16, 32, 64)


def _smol(name: str, kv_itemsize: int) -> ModelShape:
    return ModelShape(
        name=name,
        num_layers=30,
        hidden_size=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        kv_itemsize=kv_itemsize,
    )


MODELS = (
    _smol("SmolLM2-135M, KV float32", 4),
    _smol("SmolLM2-135M, KV bfloat16", 2),
    ModelShape(
        name="Llama-3-8B, KV bfloat16",
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        kv_itemsize=2,
    ),
    ModelShape(
        name="Qwen2.5-7B, KV bfloat16",
        num_layers=28,
        hidden_size=3584,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        intermediate_size=18944,
        kv_itemsize=2,
    ),
)

KINDS: dict[str, Callable[[ModelShape, int], list[tuple[int, int]]]] = {
    "attention only": lambda shape, rank: rank_runs(shape, [rank] * shape.num_layers, mlp=False),
    "all linears": lambda shape, rank: rank_runs(shape, [rank] * shape.num_layers),
    "all linears of 4 layers": lambda shape, rank: rank_runs(shape, [rank] * 4),
    "ranks r/2, r, 3r/2 by layer": lambda shape, rank: rank_runs(
        shape, [rank * (1 + layer % 3) // 2 for layer in range(shape.num_layers)]
    ),
}


def num_planes_first_fit(runs: Sequence[tuple[int, int]], plane_bytes: int) -> int | None:
    """Planes that hold the rows if no row may cross a plane's end; None if a row is larger than a plane.

    First-fit decreasing, without alignment or order: the layout at its best.
    """
    num_rows: Counter[int] = Counter()
    for count, row_bytes in runs:
        num_rows[row_bytes] += count
    if max(num_rows) > plane_bytes:
        return None
    planes: list[tuple[int, int]] = []  # (free bytes, number of such planes), in the order of opening
    for row_bytes in sorted(num_rows, reverse=True):
        left, filled = num_rows[row_bytes], []
        for free, number in [*planes, (plane_bytes, left)]:  # rows of one size open at most `left` planes
            fit = free // row_bytes
            full, part = divmod(left, fit) if fit else (0, 0)
            if full >= number:
                full, part = number, 0
            left -= full * fit + part
            touched = full + (part > 0)
            filled += [(free - fit * row_bytes, full), (free - part * row_bytes, touched - full)]
            filled += [(free, number - touched)]
        planes = [(free, number) for free, number in filled if number > 0 and free < plane_bytes]
    return sum(number for _, number in planes)


def layout_wastes(
    shape: ModelShape, runs: Sequence[tuple[int, int]], page_tokens: int
) -> tuple[float, float | None, float | None]:
    """Waste with rows inside pages (ours), with rows inside planes, and with pages of one plane each."""
    ours = adapter_waste(runs, shape.page_bytes(page_tokens))
    planes = num_planes_first_fit(runs, shape.plane_bytes(page_tokens))
    if planes is None:
        return ours, None, None
    planes_of_pages = -(-planes // shape.num_layers) * shape.num_layers
    used_planes = sum(rows * row_bytes for rows, row_bytes in runs) / shape.plane_bytes(page_tokens)
    return ours, 1 - used_planes / planes_of_pages, 1 - used_planes / planes


def _print_table(shape: ModelShape, page_tokens: int) -> None:
    print(f"\n{shape.name}: {page_tokens} tokens, {shape.page_bytes(page_tokens) / 1024:.0f} KiB a page")
    print(f"{'% of the pages taken':28}" + "".join(f"{f'rank {rank}':>19}" for rank in RANKS))
    for kind, make_runs in KINDS.items():
        cells = (layout_wastes(shape, make_runs(shape, rank), page_tokens) for rank in RANKS)
        print(f"{kind:28}" + "".join("  " + " ".join(map(_percent, cell)) for cell in cells))
    print(
        f"worst rank from {MIN_RANK} on, all linears: {_percent(worst_adapter_waste(shape, page_tokens))}; "
        f"KV of {SEQUENCE_TOKENS} tokens: {_percent(kv_waste(page_tokens))}"
    )


def _percent(waste: float | None) -> str:
    return "    -" if waste is None else f"{100 * waste:5.1f}"


def main() -> int:
    """Print the tables; 1 if adapters or sequences of a model waste more than MAX_WASTE."""
    print(
        "Waste of bfloat16 adapters with rows inside pages (ours), with rows inside planes, and with pages of"
    )
    print("one plane each; - where a row is larger than a plane.")
    broken = []
    for shape in MODELS:
        page_tokens = choose_page_tokens(shape)
        _print_table(shape, page_tokens)
        if max(worst_adapter_waste(shape, page_tokens), kv_waste(page_tokens)) > MAX_WASTE:
            broken.append(shape.name)
    if broken:
        print(f"\nmore than {100 * MAX_WASTE:.0f} % wasted: {'; '.join(broken)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
