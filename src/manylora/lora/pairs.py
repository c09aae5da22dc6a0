"""The low-rank pairs of an adapter: of one site, and of all sites in one buffer. Knows no file and no name."""

# Shapes: R rank, D in-features (of a conv: in_channels * kernel_h * kernel_w), O out-features.

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoraPair:
    """What one site gets: `y += scaling * (x @ lora_a.T) @ lora_b.T`."""

    lora_a: Tensor  # [R, D]
    lora_b: Tensor  # [O, R]
    scaling: float
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA."""

    kernel_size: tuple[int, int] | None = None
    """(height, width) of a Conv2d, whose D is in_channels * height * width, in that order. None: Linear."""

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    @property
    def in_features(self) -> int:
        return self.lora_a.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_b.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.lora_a.dtype

    @property
    def num_bytes(self) -> int:
        return self.lora_a.nbytes + self.lora_b.nbytes

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:  # [O, D]
        """Return `scaling * lora_b @ lora_a`, computed in `dtype`: what is added to the base weight."""
        return self.scaling * (self.lora_b.to(dtype) @ self.lora_a.to(dtype))


@dataclass(frozen=True, slots=True)
class SiteHeader:
    """A site's pair but for its values; the words of `LoraPair`."""

    rank: int
    in_features: int
    out_features: int
    scaling: float
    kernel_size: tuple[int, int] | None

    @property
    def num_values(self) -> int:
        return self.rank * (self.in_features + self.out_features)


@dataclass(frozen=True, eq=False)
class PairTable:
    """An adapter but for its values. Many adapters share one: those that one recipe made for one model."""

    sites: Mapping[str, SiteHeader]
    """Sorted by site."""

    dtype: torch.dtype
    """Of every pair."""

    @cached_property
    def begin(self) -> dict[str, int]:
        """Where each site's values begin in the buffer; after the last, under "", their number."""
        begins, end = {}, 0
        for site, header in self.sites.items():
            begins[site] = end
            end += header.num_values
        return begins | {"": end}

    @property
    def num_values(self) -> int:
        return self.begin[""]

    @cached_property
    def description(self) -> bytes:
        """Equal for equal sites, shapes, kernels, scalings and dtype, and for nothing else."""
        parts = [str(self.dtype).encode()]
        for site, header in self.sites.items():
            name, kernel = site.encode(), header.kernel_size or (0, 0)
            shape = (header.rank, header.in_features, header.out_features, *kernel)
            # -0.0 is 0.0
            parts += [struct.pack("<q", len(name)), name, struct.pack("<5qd", *shape, header.scaling + 0.0)]
        return b"".join(parts)


_EXPONENT = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_PART = 1 << 18
"""Values looked at together: temporaries stay in the second cache."""

INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32}
"""numpy has no bfloat16, and bits are all that is wanted."""


@dataclass(frozen=True, eq=False)
class PackedPairs(Mapping[str, LoraPair]):
    """The pairs of all sites as views of one buffer, so that what concerns all values is one operation.

    lora_a [R, D] then lora_b [O, R] of each site, row by row, in the order of the sites.
    """

    table: PairTable
    buffer: Tensor  # [table.num_values]  of table.dtype

    def __post_init__(self) -> None:
        assert self.buffer.dtype == self.table.dtype
        assert self.buffer.shape == (self.table.num_values,)

    def is_finite(self) -> bool:
        """Whether no value and no scaling is NaN or Inf."""
        if not all(math.isfinite(header.scaling) for header in self.table.sites.values()):
            return False
        # Exponents of ones alone are NaN and Inf. By numpy, on this thread alone: torch would spread it over threads
        # of its own, for which a step that is being computed would wait.
        bits = self.buffer.view(INTEGER_OF_SIZE[self.buffer.itemsize]).numpy()
        mask = bits.dtype.type(_EXPONENT[self.table.dtype])
        parts = (bits[begin : begin + _PART] for begin in range(0, len(bits), _PART))
        return all((part & mask).max() != mask for part in parts)

    def __getitem__(self, site: str) -> LoraPair:
        header, begin = self.table.sites[site], self.table.begin[site]
        middle, end = begin + header.rank * header.in_features, begin + header.num_values
        return LoraPair(
            self.buffer[begin:middle].view(header.rank, header.in_features),
            self.buffer[middle:end].view(header.out_features, header.rank),
            header.scaling,
            header.kernel_size,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.table.sites)

    def __len__(self) -> int:
        return len(self.table.sites)

    def __contains__(self, site: object) -> bool:
        return site in self.table.sites


def pack(pairs: Mapping[str, LoraPair]) -> PackedPairs:
    """Copy pairs, sorted by site and of one dtype, into one buffer on the host."""
    sites = {
        site: SiteHeader(pair.rank, pair.in_features, pair.out_features, pair.scaling, pair.kernel_size)
        for site, pair in pairs.items()
    }
    tensors = [half for pair in pairs.values() for half in (pair.lora_a, pair.lora_b)]
    table = PairTable(sites, tensors[0].dtype)
    assert all(tensor.dtype == table.dtype for tensor in tensors), "pack() takes what validate() lets pass"
    return PackedPairs(table, torch.cat([tensor.detach().cpu().reshape(-1) for tensor in tensors]))
