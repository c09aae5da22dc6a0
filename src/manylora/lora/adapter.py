"""An adapter: for each site of a base model a low-rank pair and its scaling. Knows no file and no model."""

# Shapes: R rank, D in-features (of a conv: in_channels * kernel_h * kernel_w), O out-features.

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import cached_property
from typing import NewType

import torch
from blake3 import blake3

from manylora.errors import AdapterFormatError
from manylora.lora.pairs import LoraPair, PackedPairs, pack

__all__ = ["ADAPTER_DTYPES", "Adapter", "AdapterId", "LoraPair", "widest"]

AdapterId = NewType("AdapterId", str)
"""Hex of the hash of an adapter's content. Two names of the same content have the same id."""

ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Adapter:
    """The pairs of all sites. The id is computed once, so nothing may write to the tensors."""

    sites: Mapping[str, LoraPair]
    """Site (a module path in the base model, "model.layers.0.self_attn.q_proj") to its pair; sorted. Of an adapter from
    a file they are views that are made when they are asked for."""

    name: str = ""
    """For messages only. Not part of the identity."""

    base_model: str | None = None
    """The base model that the file says it was trained on. Not part of the identity."""

    def __post_init__(self) -> None:
        if not isinstance(self.sites, PackedPairs):
            object.__setattr__(self, "sites", dict(sorted(self.sites.items())))

    @cached_property
    def packed(self) -> PackedPairs:
        """All pairs in one buffer. Of a valid adapter only: pairs of several dtypes have no common one."""
        return self.sites if isinstance(self.sites, PackedPairs) else pack(self.sites)

    @cached_property
    def identity(self) -> AdapterId:
        """Equal for equal sites, shapes, dtypes, kernels, scalings and bits, whatever file held them.

        Raises:
            AdapterFormatError: `begin_checks` found the adapter not to be valid.
        """
        begun: Future[AdapterId] | None = self.__dict__.get("_checking")
        if begun is None:
            return self._hash()
        found = begun.result()
        self.__dict__.pop("_checking", None)
        return found

    def begin_checks(self, executor: Executor, on_valid: Callable[[AdapterId], None]) -> None:
        """Validate, and find the identity out, on another thread, beside what else is to be done. Who asks for the
        identity meanwhile waits.

        Args:
            on_valid: called with the identity, before anybody who waits is told.
        """

        def check() -> AdapterId:
            self.validate()
            identity = self._hash()
            on_valid(identity)
            return identity

        object.__setattr__(self, "_checking", executor.submit(check))

    def _hash(self) -> AdapterId:
        digest = blake3(self.packed.table.description)
        # At once: hashing lets go of the interpreter lock, and each time it takes it back it holds up who computes.
        digest.update(self.packed.buffer.view(torch.uint8).numpy().data)
        return AdapterId(digest.hexdigest())

    @property
    def num_bytes(self) -> int:
        return sum(pair.num_bytes for pair in self.sites.values())

    @property
    def ranks(self) -> dict[str, int]:
        return {site: pair.rank for site, pair in self.sites.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every tensor; a valid adapter has one."""
        return next(iter(self.sites.values())).dtype

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"adapter '{self.name}'" if self.name else "an unnamed adapter"

    def validate(self) -> None:
        """Check that every pair can be run.

        Raises:
            AdapterFormatError: naming the site, what was expected and what came.
        """
        if not self.sites:
            raise AdapterFormatError(f"{self.label} has no site: it would change nothing")
        if isinstance(self.sites, PackedPairs) and self.sites.is_finite():
            return  # shapes and dtypes are those of its table
        for site, pair in self.sites.items():
            problem = _shape_problem(pair) or _dtype_problem(pair, self.dtype) or _value_problem(pair)
            if problem:
                raise AdapterFormatError(f"{self.label}, site '{site}': {problem}")


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds all `dtypes` exactly: float32 for bfloat16 and float16 together."""
    distinct = set(dtypes)
    return distinct.pop() if len(distinct) == 1 else torch.float32


def _shape_problem(pair: LoraPair) -> str | None:
    a, b = tuple(pair.lora_a.shape), tuple(pair.lora_b.shape)
    if len(a) != 2 or len(b) != 2:
        return f"expected lora_a [rank, in] and lora_b [out, rank], got {list(a)} and {list(b)}"
    if a[0] != b[1]:
        return f"lora_a {list(a)} has rank {a[0]}, lora_b {list(b)} has rank {b[1]}; both must be the same"
    if 0 in a or 0 in b:
        return (
            f"expected a rank and sizes of at least 1, got lora_a {list(a)} and lora_b {list(b)}; "
            "a zero size usually means that sharded weights were not gathered before saving"
        )
    if pair.kernel_size is not None:
        height, width = pair.kernel_size
        if height < 1 or width < 1 or a[1] % (height * width):
            return f"lora_a {list(a)} is no whole number of channels of a {height}x{width} kernel"
    return None


def _dtype_problem(pair: LoraPair, expected: torch.dtype) -> str | None:
    for label, tensor in (("lora_a", pair.lora_a), ("lora_b", pair.lora_b)):
        if tensor.dtype not in ADAPTER_DTYPES:
            return f"{label} is {tensor.dtype}, expected one of {list(ADAPTER_DTYPES)}; convert it first"
        if tensor.dtype != expected:
            return (
                f"{label} is {tensor.dtype}, the first site is {expected}; convert all sites to one dtype"
            )
    return None


def _value_problem(pair: LoraPair) -> str | None:
    if not math.isfinite(pair.scaling):
        return f"scaling is {pair.scaling}, expected a finite number; check lora_alpha and the rank"
    for label, tensor in (("lora_a", pair.lora_a), ("lora_b", pair.lora_b)):
        # The extremes of a tensor with a NaN are NaN: one pass without a temporary sees NaN and Inf.
        low, high = torch.aminmax(tensor)
        if not (math.isfinite(low) and math.isfinite(high)):
            num_bad = int((~torch.isfinite(tensor)).sum())
            return (
                f"{label} holds NaN or Inf in {num_bad} of {tensor.numel()} values; its training diverged"
            )
    return None
