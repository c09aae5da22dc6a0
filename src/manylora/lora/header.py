"""What is known of an adapter before its weights are read. Knows no format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.errors import AdapterFormatError
from manylora.lora.pairs import LoraPair, SiteHeader
from manylora.lora.tensor_file import TensorInfo

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class AdapterHeader:
    """All of an adapter but its weights: known from the config and the first bytes of the tensor file."""

    sites: Mapping[str, SiteHeader]
    dtype: torch.dtype
    """The dtype that the loaded adapter has."""

    name: str = ""
    base_model: str | None = None

    @property
    def ranks(self) -> dict[str, int]:
        return {site: header.rank for site, header in self.sites.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights of the loaded adapter."""
        return sum(site.num_values for site in self.sites.values()) * self.dtype.itemsize


def dtype_of(name: str, info: TensorInfo, source: object) -> torch.dtype:
    """Return the dtype of a tensor of weights; `source` is how the message calls the file."""
    if info.dtype not in DTYPES:
        raise AdapterFormatError(
            f"{source}: tensor '{name}' is {info.dtype}, expected one of {sorted(DTYPES)}; "
            "convert it before saving, for instance with model.float().save_pretrained(directory)"
        )
    return DTYPES[info.dtype]


def pair_sizes(
    site: str, a: tuple[int, ...], b: tuple[int, ...], source: object
) -> tuple[int, int, tuple[int, int] | None]:
    """Return (in_features, out_features, kernel_size) from the shapes of a pair as files hold it."""
    is_conv = len(a) == len(b) == 4 and b[2:] == (1, 1)
    if not (is_conv or len(a) == len(b) == 2) or 0 in a + b:
        raise AdapterFormatError(
            f"{source}: site '{site}' has lora_A {list(a)} and lora_B {list(b)}; expected [rank, in] and "
            "[out, rank] of a Linear or [rank, in, height, width] and [out, rank, 1, 1] of an ungrouped Conv2d"
        )
    return (a[1] * a[2] * a[3], b[0], (a[2], a[3])) if is_conv else (a[1], b[0], None)


def pair_of(a: Tensor, b: Tensor, known: SiteHeader, dtype: torch.dtype) -> LoraPair:
    """Make a pair of the two tensors of a file."""
    return LoraPair(a.flatten(1).to(dtype), b.flatten(1).to(dtype), known.scaling, known.kernel_size)


def tensors_of(pair: LoraPair) -> tuple[Tensor, Tensor]:
    """Return a pair in the shapes that files hold: what `pair_of` reads."""
    a, b = pair.lora_a, pair.lora_b
    if pair.kernel_size is None:
        return a, b
    return a.reshape(pair.rank, -1, *pair.kernel_size), b[:, :, None, None]
