"""Where the rank rows of an adapter lie in its pages. Knows bytes; no tensors, no layers, no sites."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from manylora.errors import CapacityError

RUN_ALIGN_BYTES = 128
"""A run starts on a multiple of this within its page: a cache line of a GPU, two of a CPU."""


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Rank row i lies at byte `offset[i]` of the adapter's page number `page[i]`."""

    num_pages: int
    page: npt.NDArray[np.int32]  # [R]  ordinal in the adapter's own page list
    offset: npt.NDArray[np.int64]  # [R]  bytes from that page's start


def place_rank_rows(runs: Sequence[tuple[int, int]], page_bytes: int) -> Placement:
    """Place runs of equal rank rows one after the other, opening a page when a row no longer fits.

    Rows stay in the order in which the kernels read them, so an adapter is read front to back. A run starts
    RUN_ALIGN_BYTES-aligned and its rows are tight; a row never crosses a page's end. Rows may cross planes:
    a page is contiguous bytes (docs/decisions/0001-one-pool-of-byte-pages.md).

    Args:
        runs: (num_rows, row_bytes) of each run. Runs of no rows take no place. page_bytes: bytes of a
        page; a multiple of RUN_ALIGN_BYTES if runs are to be aligned in the pool as well.
    Raises:
        CapacityError: a row is larger than a page.
    """
    pieces: list[
        tuple[int, int, int, int]
    ] = []  # page, offset, row_bytes, num_rows: tight rows within one page
    page, begin = 0, 0
    for num_rows, row_bytes in runs:
        assert num_rows >= 0, f"a run of {num_rows} rows"
        assert row_bytes >= 1, f"a run of rows of {row_bytes} bytes"
        if row_bytes > page_bytes:
            raise CapacityError(
                f"a rank row of {row_bytes} bytes does not fit in a page of {page_bytes} bytes; "
                "use a larger page_tokens"
            )
        if num_rows > 0:
            begin = -(-begin // RUN_ALIGN_BYTES) * RUN_ALIGN_BYTES
        while num_rows > 0:
            fit = min(num_rows, (page_bytes - begin) // row_bytes)
            if fit <= 0:
                page, begin = page + 1, 0
                continue
            pieces.append((page, begin, row_bytes, fit))
            begin += fit * row_bytes
            num_rows -= fit
    return _expand_pieces(pieces)


def _expand_pieces(pieces: list[tuple[int, int, int, int]]) -> Placement:
    # One array operation for all rows: an adapter has thousands of rows, but few pieces.
    piece = np.array(pieces, dtype=np.int64).reshape(-1, 4)
    rows_of_piece = piece[:, 3]
    page, offset, row_bytes, first_row = np.repeat(
        np.stack([piece[:, 0], piece[:, 1], piece[:, 2], np.cumsum(rows_of_piece) - rows_of_piece]),
        rows_of_piece,
        axis=1,
    )
    offset = offset + (np.arange(len(page)) - first_row) * row_bytes
    num_pages = int(piece[-1, 0]) + 1 if pieces else 0
    return Placement(num_pages=num_pages, page=page.astype(np.int32), offset=offset)
