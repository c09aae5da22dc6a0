"""Where the pairs of an adapter lie in its file: the same for all adapters that one recipe made for one model.

So it is worked out once for the files that begin alike. Of a thousand such adapters, all but the first are read without
a look at their 420 tensors one by one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manylora.lora.header import DTYPES
from manylora.lora.pairs import INTEGER_OF_SIZE, PackedPairs, PairTable
from manylora.lora.tensor_file import TensorInfo

MAX_KEPT = 256


@dataclass(frozen=True, eq=False)
class PairSpans:
    """The pairs of a file."""

    table: PairTable
    halves: Sequence[TensorInfo]
    """lora_A and lora_B of each site of the table, in its order."""

    file_bytes: int

    def pairs(self, data: NDArray[np.uint8]) -> PackedPairs:
        """Return the pairs in the bytes of a whole file: as they lie where that is in order, else a copy."""
        return PackedPairs(self.table, self._values(data))

    def _values(self, data: NDArray[np.uint8]) -> Tensor:
        if self._in_order is not None:
            return _as_tensor(data[self._in_order], self.table.dtype)
        parts = [_as_tensor(data[slice(*half.span)], DTYPES[half.dtype]) for half in self.halves]
        return torch.cat([part.to(self.table.dtype) for part in parts])

    @cached_property
    def _in_order(self) -> slice | None:
        """The values as they lie, where that is as `PackedPairs` has them: so PEFT writes them."""
        is_one_dtype = {half.dtype for half in self.halves} == {self.halves[0].dtype}
        is_tight = all(one.span[1] == after.span[0] for one, after in pairwise(self.halves))
        return slice(self.halves[0].span[0], self.halves[-1].span[1]) if is_one_dtype and is_tight else None


class KnownSpans:
    """Spans by what decides them; the least recently used are forgotten. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, PairSpans] = OrderedDict()

    def get(self, key: Hashable) -> PairSpans | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key]

    def keep(self, key: Hashable, spans: PairSpans) -> None:
        with self._lock:
            self._kept[key] = spans
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)


def _as_tensor(data: NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    """[n * itemsize] bytes as [n] values."""
    aligned = data if data.ctypes.data % dtype.itemsize == 0 else data.copy()
    return torch.from_numpy(aligned).view(INTEGER_OF_SIZE[dtype.itemsize]).view(dtype)
