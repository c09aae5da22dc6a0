"""What this machine can do at best, measured: memory read and matrix products at the model's shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from manylora.bench.machine import last_level_cache_bytes
from manylora.models.layers import BaseProduct

GEMM_ROWS = (32, 128, 512)
READ_BYTES = 512 << 20
CACHES_PER_READ = 4
"""What is read is READ_BYTES, or so many last-level caches where that is more: large servers keep 512 MB."""

_MIN_WEIGHT_BYTES = 256 << 20  # well beyond any cache, as the weights of a whole model are


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Best of several tries each."""

    memory_read_gb_s: float
    """10^9 bytes a second, all threads together, from a buffer that no cache holds."""

    gemm_gflop_s: Mapping[int, float]
    """Rows of x to 10^9 floating point operations a second of `x @ W.T` over the products of a layer."""

    def gemm_at(self, rows: int) -> float:
        """The rate at the nearest measured number of rows that is not smaller; beyond all, the largest."""
        return self.gemm_gflop_s[
            next((known for known in sorted(self.gemm_gflop_s) if known >= rows), max(self.gemm_gflop_s))
        ]


def measure_ceilings(
    products: Sequence[tuple[int, int]],
    num_layers: int,
    dtype: torch.dtype,
    *,
    int8: bool = False,
    threads: int,
    read_bytes: int | None = None,
    min_weight_bytes: int = _MIN_WEIGHT_BYTES,
) -> Ceilings:
    """Measure for a model whose every layer multiplies by weights of shape (out, in) as in `products`.

    Args:
        dtype: of x, and of the weights unless `int8`.
        read_bytes: None: as READ_BYTES says.
    """
    read_bytes = read_bytes or max(READ_BYTES, CACHES_PER_READ * last_level_cache_bytes())
    with torch_threads(threads), torch.inference_mode():
        return Ceilings(
            memory_read_gb_s=read_bytes / _best_s(_reader(read_bytes)) / 1e9,
            gemm_gflop_s={
                rows: _gemm_gflop_s(products, num_layers, dtype, rows, min_weight_bytes, int8=int8)
                for rows in GEMM_ROWS
            },
        )


def _gemm_gflop_s(
    products: Sequence[tuple[int, int]],
    num_layers: int,
    dtype: torch.dtype,
    rows: int,
    min_weight_bytes: int,
    *,
    int8: bool,
) -> float:
    # As many layers as make the weights come from memory, each with weights of its own, as in the model.
    layer_bytes = sum(out * fan_in for out, fan_in in products) * (1 if int8 else dtype.itemsize)
    layers = max(1, min(num_layers, -(-min_weight_bytes // layer_bytes)))
    stack = [_product(out, fan_in, dtype, int8=int8) for _ in range(layers) for out, fan_in in products]
    inputs = {fan_in: torch.full((rows, fan_in), 0.01, dtype=dtype) for _, fan_in in products}

    def multiply() -> None:
        for product in stack:
            product(inputs[product.in_features])

    num_weights = layers * sum(out * fan_in for out, fan_in in products)
    return 2 * rows * num_weights / _best_s(multiply) / 1e9


def _product(out: int, fan_in: int, dtype: torch.dtype, *, int8: bool) -> BaseProduct:
    """The decoder's own product, so that the rate is that of the best implementation we know."""
    product = BaseProduct(fan_in, out, bias=False, dtype=dtype, device=torch.device("cpu"))
    assert product.weight is not None
    product.weight.fill_(0.01)
    product.finish(int8=int8)
    return product


def _reader(num_bytes: int) -> Callable[[], None]:
    buffer = torch.ones(num_bytes // 4)

    def read() -> None:
        # One operation a value, vectorised and on all threads: the processor waits for memory alone.
        torch.dot(buffer, buffer)

    return read


def _best_s(work: Callable[[], None], tries: int = 5) -> float:
    best_s = float("inf")
    for _ in range(tries + 1):  # the first one warms up, and may as well count
        started = time.perf_counter()
        work()
        best_s = min(best_s, time.perf_counter() - started)
    return best_s


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
