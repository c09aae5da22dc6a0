"""Random numbers that depend on a sequence's seed and position alone, and a draw by integer weights.

There is no generator whose state moves on with each draw: what a sequence draws cannot depend on what
else was in its batch, on preemption, or on the order of requests.
"""

# Shapes: M rows, V tokens of the vocabulary.

import secrets
import struct
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

_UINT64 = 2**64 - 1


def sample_seed(seed: int | None, sample: int = 0) -> int:
    """Return the 64-bit seed of one of a request's n samples; None: a new one from the operating system."""
    if seed is None:
        return secrets.randbits(64)
    return seed & _UINT64 if sample == 0 else _hash64(b"sample", seed, sample)


def random_bits(seed: int, position: int) -> int:
    """Return 64 random bits, the same for the same (seed, position) on every machine."""
    return _hash64(b"token", seed, position)


def draw(
    weights: Tensor,  # [M, V]  int64, not negative; a row's sum fits an int64
    bits: Sequence[int],  # M numbers of 64 random bits
) -> list[int]:
    """Draw one token a row: v with probability weights[v] / sum(weights), to within 2^-64.

    By inversion: the bits pick a point in [0, sum), and the token is the one whose weight covers it. A
    weight of 0 covers none.
    """
    reached = weights.cumsum(-1)
    totals = reached[:, -1].tolist()
    points = [(number * total) >> 64 for number, total in zip(bits, totals, strict=True)]
    points_M1 = torch.tensor(points, device=weights.device)[:, None]
    token_ids: list[int] = torch.searchsorted(reached, points_M1, right=True)[:, 0].tolist()
    return token_ids


def _hash64(purpose: bytes, *numbers: int) -> int:
    # A cryptographic hash as a counter-based generator: neighbouring seeds and positions share nothing.
    # 1 microsecond a number, so a token needs no vectorised generator.
    words = struct.pack(f"<{len(numbers)}Q", *(number & _UINT64 for number in numbers))
    return int.from_bytes(blake2b(words, digest_size=8, person=purpose).digest(), "little")
