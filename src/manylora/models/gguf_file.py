"""The GGUF container: metadata and tensors by name. Knows no architecture.

The reader of the gguf package makes an array object of every string, which for a vocabulary of 50,000 takes
longer than reading the weights; so the header is read here, and the package's dequantisation is used.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from manylora.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where general.alignment says nothing else

# Codes of metadata values, by the struct format that reads them.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class _TensorEntry:
    shape: tuple[int, ...]  # row-major, as torch counts
    kind: gguf.GGMLQuantizationType
    offset: int
    """Bytes from the beginning of the file."""


class GgufFile:
    """One memory-mapped file. Tensors are read and dequantised when asked for."""

    metadata: Mapping[str, Any]

    def __init__(self, path: Path) -> None:
        """Read the header of `path`.

        Raises:
            ModelError: it is no GGUF file of version 2 or 3, or it ends before its content does.
        """
        self.path = path
        with path.open("rb") as file:
            if file.read(4) != _MAGIC:
                raise ModelError(f"'{path}' is no GGUF file: it does not begin with 'GGUF'")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.metadata, self._entries = _read_header(_Cursor(self._bytes, offset=4))
        except (struct.error, ValueError) as error:
            raise ModelError(
                f"'{path}' is damaged, or not a GGUF file that is read here: {error}"
            ) from error

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, values fp32) of every tensor, in the file's order."""
        for name, entry in self._entries.items():
            yield name, self._read(name, entry)

    def _read(self, name: str, entry: _TensorEntry) -> np.ndarray:
        elements_per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[entry.kind]
        *rows, row_len = entry.shape
        row_bytes = row_len // elements_per_block * bytes_per_block
        num_bytes = int(np.prod(rows, dtype=np.int64)) * row_bytes
        if entry.offset + num_bytes > len(self._bytes):
            raise ModelError(f"'{self.path}' ends inside tensor '{name}': the file is truncated")
        raw = np.frombuffer(self._bytes, np.uint8, num_bytes, entry.offset).reshape(*rows, row_bytes)
        try:
            values: np.ndarray = gguf.quants.dequantize(raw, entry.kind)
        except NotImplementedError as error:
            raise ModelError(
                f"'{self.path}': tensor '{name}' is {entry.kind.name}, not read here"
            ) from error
        return values.reshape(entry.shape)


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: mmap.mmap, *, offset: int) -> None:
        self.data, self.offset = data, offset

    def take(self, formats: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{formats}", self.data, self.offset)
        self.offset += struct.calcsize(f"<{formats}")
        return values

    def take_string(self) -> str:
        (length,) = self.take("Q")
        begin, self.offset = self.offset, self.offset + length
        if self.offset > len(self.data):
            raise ValueError("a text runs past the end of the file")
        return self.data[begin : self.offset].decode("utf-8", errors="replace")

    def take_value(self, code: int) -> Any:
        if code == _STRING:
            return self.take_string()
        if code == _ARRAY:
            item_code, length = self.take("IQ")
            if item_code in _SCALARS:
                return list(self.take(f"{length}{_SCALARS[item_code]}"))
            return [self.take_value(item_code) for _ in range(length)]
        if code not in _SCALARS:
            raise ValueError(f"unknown type {code} of a metadata value")
        return self.take(_SCALARS[code])[0]


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _TensorEntry]]:
    version, num_tensors, num_values = cursor.take("IQQ")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, accepted: {_VERSIONS}")
    metadata = {}
    for _ in range(num_values):
        key = cursor.take_string()
        metadata[key] = cursor.take_value(*cursor.take("I"))
    raw_entries = [_take_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    data_begin = -(-cursor.offset // alignment) * alignment
    entries = {
        name: _TensorEntry(shape, gguf.GGMLQuantizationType(kind), data_begin + offset)
        for name, shape, kind, offset in raw_entries
    }
    return metadata, entries


def _take_tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.take_string()
    (num_dims,) = cursor.take("I")
    dims = cursor.take(f"{num_dims}Q")
    kind, offset = cursor.take("IQ")
    return name, tuple(reversed(dims)), kind, offset
